/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Tells a sender at once that nobody answers: with a RST if it speaks TCP, else with
 * "port unreachable" (REJ-1). The packet itself is made into the answer, and goes back
 * where it came from.
 */
#ifndef LB_REJECT_H
#define LB_REJECT_H

#include "client.h"
#include "csum.h"

#define LB_NEXT -1 /* TCX_NEXT: whoever comes after us */
#define LB_DROP 2  /* TCX_DROP */

#define LB_HOPS 64
#define LB_ICMP_UNREACHABLE 3
#define LB_ICMP_PORT 3
#define LB_ICMP_TOO_BIG 4
#define LB_ICMPV6_UNREACHABLE 1
#define LB_ICMPV6_PORT 4
#define LB_ICMPV6_TOO_BIG 2
#define LB_MOST_QUOTED 96 /* bytes */
#define LB_MOST_CUT 0xffc /* bytes that bpf_skb_adjust_room takes away */

static __always_inline __u32 pseudo_sum(const __be32 src[4], const __be32 dst[4], __u32 length,
					__u8 proto)
{
	__be32 words[10];

	/* The upper words of mapped addresses are not part of an IPv4 pseudo header. */
	bool ipv4 = address_is_v4(src);

	for (int i = 0; i < 4; i++) {
		words[i] = ipv4 && i < 3 ? 0 : src[i];
		words[4 + i] = ipv4 && i < 3 ? 0 : dst[i];
	}
	words[8] = bpf_htonl(length);
	words[9] = bpf_htonl(proto);
	return bpf_csum_diff(NULL, 0, words, sizeof(words), 0);
}

/* Swaps the Ethernet addresses and sends the packet back. */
static __always_inline int send_back(struct __sk_buff *skb, const struct packet *p)
{
	void *data = skb_data(skb);
	struct eth_header *eth = data;
	__u8 mac[6];

	if (!p->l2)
		return bpf_redirect(skb->ifindex, 0);

	if ((void *)(eth + 1) > skb_end(skb))
		return LB_DROP;
	__builtin_memcpy(mac, eth->dst, 6);
	__builtin_memcpy(eth->dst, eth->src, 6);
	__builtin_memcpy(eth->src, mac, 6);
	return bpf_redirect(skb->ifindex, 0);
}

/* Leaves of a packet its link header and room for so many bytes, and nothing of what the
 * device was to do: that would fill in a checksum where the old packet had one. Only taking
 * away what it covers makes the kernel forget about it. Its end comes first: before Linux
 * 6.13 no length is right for a packet whose header of layer 4 is gone.
 */
static __always_inline bool packet_renew(struct __sk_buff *skb, const struct packet *p,
					 __u32 length)
{
	__u32 gone = p->l4 + sizeof(struct udp_header);

	/* What is checksummed behind this is no packet that any kernel makes. */
	if (gone > LB_MOST_CUT)
		gone = LB_MOST_CUT;
	return !bpf_skb_change_tail(skb, p->l2 + gone + length, 0) &&
	       !bpf_skb_adjust_room(skb, -(__s32)gone, BPF_ADJ_ROOM_MAC, 0);
}

/* Writes an IP header from one end to the other. */
static __always_inline bool ip_make(struct __sk_buff *skb, __u32 at, bool ipv4, const __be32 src[4],
				    const __be32 dst[4], __u32 length, __u8 proto)
{
	if (ipv4) {
		struct ipv4_header ip = {
			.version_ihl = 0x45,
			.length = bpf_htons(sizeof(ip) + length),
			.fragment = bpf_htons(0x4000),
			.ttl = LB_HOPS,
			.proto = proto,
			.src = src[3],
			.dst = dst[3],
		};

		ip.checksum = ipv4_checksum(&ip);
		return !bpf_skb_store_bytes(skb, at, &ip, sizeof(ip), 0);
	}
	struct ipv6_header ip = {
		.version_flow = bpf_htonl(6u << 28),
		.length = bpf_htons(length),
		.next = proto,
		.hops = LB_HOPS,
	};

	address_copy(ip.src, src);
	address_copy(ip.dst, dst);
	return !bpf_skb_store_bytes(skb, at, &ip, sizeof(ip), 0);
}

static __always_inline __u32 ip_length(bool ipv4)
{
	return ipv4 ? sizeof(struct ipv4_header) : sizeof(struct ipv6_header);
}

static __always_inline int reject_tcp(struct __sk_buff *skb, const struct packet *p)
{
	struct tcp_header *asked = packet_at(skb_data(skb), p->l4);
	struct tcp_header rst = {.offset = 5 << 4};
	__u32 at = p->l2 + ip_length(p->ipv4), sum, length;

	if ((void *)(asked + 1) > skb_end(skb))
		return LB_DROP;
	rst.ports.source = p->tuple.dport;
	rst.ports.destination = p->tuple.sport;
	/* RFC 9293, 3.10.7.1 */
	if (asked->flags & LB_TCP_ACK) {
		rst.sequence = asked->acknowledged;
		rst.flags = LB_TCP_RST;
	} else {
		length = p->end - p->l4 - (asked->offset >> 4) * 4;
		length += !!(asked->flags & LB_TCP_SYN) + !!(asked->flags & LB_TCP_FIN);
		rst.acknowledged = bpf_htonl(bpf_ntohl(asked->sequence) + length);
		rst.flags = LB_TCP_RST | LB_TCP_ACK;
	}
	sum = pseudo_sum(p->tuple.dst, p->tuple.src, sizeof(rst), LB_IPPROTO_TCP);
	rst.checksum = ~csum_fold(bpf_csum_diff(NULL, 0, &rst, sizeof(rst), sum));

	if (!packet_renew(skb, p, ip_length(p->ipv4) + sizeof(rst)) ||
	    !ip_make(skb, p->l2, p->ipv4, p->tuple.dst, p->tuple.src, sizeof(rst),
		     LB_IPPROTO_TCP) ||
	    bpf_skb_store_bytes(skb, at, &rst, sizeof(rst), 0))
		return LB_DROP;
	return send_back(skb, p);
}

/* What ICMP says of a packet: too big for `mtu`, or with 0 that its port is unreachable. */
static __always_inline void icmp_message(bool ipv4, __u16 mtu, struct icmp_header *icmp)
{
	icmp->mtu = bpf_htons(mtu);
	if (ipv4) {
		icmp->type = LB_ICMP_UNREACHABLE;
		icmp->code = mtu ? LB_ICMP_TOO_BIG : LB_ICMP_PORT;
	} else {
		icmp->type = mtu ? LB_ICMPV6_TOO_BIG : LB_ICMPV6_UNREACHABLE;
		icmp->code = mtu ? 0 : LB_ICMPV6_PORT;
	}
}

/* Answers with an ICMP message that quotes the packet's headers and 8 bytes behind them. */
static __always_inline int answer_icmp(struct __sk_buff *skb, const struct packet *p, __u16 mtu)
{
	struct icmp_header icmp = {};
	__u32 quoted = p->l4 - p->l3 + 8, header = ip_length(p->ipv4) + sizeof(icmp), sum = 0;
	__u8 proto = p->ipv4 ? LB_IPPROTO_ICMP : LB_IPPROTO_ICMPV6;
	struct settings *set = settings_get();
	struct device *device = device_find(skb->ifindex);
	__be32 quote[LB_MOST_QUOTED / 4] = {};
	__be32 src[4] = {};

	icmp_message(p->ipv4, mtu, &icmp);
	if (quoted > LB_MOST_QUOTED)
		quoted = LB_MOST_QUOTED;
	if (device)
		address_copy(src, p->ipv4 ? device->addr4 : device->addr6);
	if (set && !(src[0] | src[1] | src[2] | src[3]))
		address_copy(src, p->ipv4 ? set->node4_addr : set->node6_addr);
	/* A node without an address of this family says nothing. */
	if (!(src[0] | src[1] | src[2] | src[3]))
		return LB_DROP;

	/* Its bounds, for the verifier, of the register that holds it in the calls below. */
	asm volatile("" : "+r"(quoted));
	if (!quoted || quoted > LB_MOST_QUOTED || bpf_skb_load_bytes(skb, p->l3, quote, quoted) ||
	    !packet_renew(skb, p, header + quoted))
		return LB_DROP;
	if (!p->ipv4)
		sum = pseudo_sum(src, p->tuple.src, sizeof(icmp) + quoted, proto);
	sum = bpf_csum_diff(NULL, 0, &icmp, sizeof(icmp), sum);
	icmp.checksum = ~csum_fold(bpf_csum_diff(NULL, 0, quote, sizeof(quote), sum));
	if (!ip_make(skb, p->l2, p->ipv4, src, p->tuple.src, sizeof(icmp) + quoted, proto) ||
	    bpf_skb_store_bytes(skb, p->l2 + ip_length(p->ipv4), &icmp, sizeof(icmp), 0) ||
	    bpf_skb_store_bytes(skb, p->l2 + header, quote, quoted, 0))
		return LB_DROP;
	return send_back(skb, p);
}

#endif
