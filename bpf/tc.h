/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * What the programs in tc have in common.
 */
#ifndef LB_TC_H
#define LB_TC_H

#include "open.h"
#include "rewrite.h"

#define LB_PACKET_HOST 0

/* Where a packet is seen. */
#define LB_FROM_OUTSIDE 0
#define LB_FROM_INSIDE 1 /* pods, on a device of their own or one that they share */
#define LB_TO_ANY 2
#define LB_FROM_TUNNEL 3 /* come in, and taken out of another packet */
#define LB_FROM_PORT 4	 /* as pods' again, at the port of the bridge that they share */

/* Headers that a packet needs in one piece, as far as it has them. */
#define LB_HEADERS 128

/* Bytes before the IP header: those of Ethernet, or none on a tunnel's device, as of IPIP
 * or WireGuard. Seldom is there any need to ask which kind of device it is. Not a branch
 * with two constants: the verifier would follow everything behind it twice.
 */
static __always_inline __u32 l2_length(struct __sk_buff *skb, void *data, void *data_end)
{
	__u32 mask = ~0u;

	if (data + 1 <= data_end &&
	    *(__u8 *)data >> 4 == (skb->protocol == bpf_htons(LB_ETH_IPV4) ? 4 : 6)) {
		struct device *device = device_find(skb->ifindex);

		if (device && (device->flags & LB_DEVICE_BARE))
			mask = 0;
	}
	asm volatile("" : "+r"(mask));
	return mask & sizeof(struct eth_header);
}

/* Whether the linear part of a packet holds all headers that are looked at: so it is with
 * most that the kernel makes, whose data is elsewhere. The only ones that are neither longer
 * than usual nor hold other packets are those without options and extensions.
 */
static __always_inline bool usual_headers(struct __sk_buff *skb, void *data, void *data_end)
{
	void *l3 = data + l2_length(skb, data, data_end), *behind;
	__u8 proto;

	if (skb->protocol == bpf_htons(LB_ETH_IPV4)) {
		struct ipv4_header *ip = l3;

		behind = ip + 1;
		if (behind > data_end || ip->version_ihl != 0x45)
			return false;
		proto = ip->proto;
	} else {
		struct ipv6_header *ip = l3;

		behind = ip + 1;
		if (behind > data_end)
			return false;
		proto = ip->next;
	}
	if (proto == LB_IPPROTO_UDP)
		return behind + sizeof(struct udp_header) <= data_end;
	return (proto == LB_IPPROTO_TCP || proto == LB_IPPROTO_SCTP) &&
	       behind + sizeof(struct tcp_header) <= data_end;
}

/* Makes a packet's headers linear, as far as it has them. Not without need: on its way out
 * a segment shares its memory with the socket's copy, and all would be copied.
 */
static __always_inline bool headers_pull(struct __sk_buff *skb)
{
	void *data = skb_data(skb), *data_end = skb_end(skb);

	if (data + LB_HEADERS <= data_end || data + skb->len <= data_end ||
	    usual_headers(skb, data, data_end))
		return true;
	return !bpf_skb_pull_data(skb, skb->len < LB_HEADERS ? skb->len : LB_HEADERS);
}

/* Parses a packet; false for what is left as it is. */
static __always_inline bool tc_parse(struct __sk_buff *skb, struct packet *p)
{
	void *data, *data_end;

	/* A tagged frame is its VLAN device's; tag 0 is none (IEEE 802.1Q, 9.6). */
	if ((skb->vlan_present && (skb->vlan_tci & 0xfff)) || !headers_pull(skb))
		return false;
	/* Read anew also where nothing was pulled: for the verifier, both ways are then one. */
	data = skb_data(skb);
	data_end = skb_end(skb);
	return packet_parse(data, data_end, skb->len, l2_length(skb, data, data_end), skb->protocol,
			    p);
}

/* Takes a fragment's ports from the first one, or keeps them for the others. */
static __always_inline bool fragment_ports(struct packet *p)
{
	struct fragment_key key = {.id = p->fragment_id, .proto = p->tuple.proto};
	struct fragment ports, *known;

	address_copy(key.src, p->tuple.src);
	address_copy(key.dst, p->tuple.dst);
	if (p->fragment == LB_FIRST_FRAGMENT) {
		ports.sport = p->tuple.sport;
		ports.dport = p->tuple.dport;
		fragments.update(&key, &ports);
		return true;
	}
	known = fragments.lookup(&key);
	if (!known)
		return false;
	p->tuple.sport = known->sport;
	p->tuple.dport = known->dport;
	return true;
}

static __always_inline int tc_rewrite(struct __sk_buff *skb, struct packet *p, struct flow *to,
				      __u8 stage)
{
	if (rewrite(skb, p, to, stage))
		return LB_NEXT;
	counter_bump(LB_COUNTER_MANGLED);
	return LB_DROP;
}

#endif
