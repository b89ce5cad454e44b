/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Gives a packet other addresses and ports, in tc. Checksums are updated and not
 * computed anew, so that one which was wrong stays wrong, and by the kernel's helper,
 * which knows what a checksum that the device is to complete looks like.
 */
#ifndef LB_REWRITE_H
#define LB_REWRITE_H

#include "counters.h"
#include "csum.h"
#include "sctp.h"

#define LB_F_IPV6 0x80 /* BPF_F_IPV6, Linux 6.16: IPv6 has no header checksum to make up for it */

/* The offset of the checksum that covers ports and addresses, 0 where there is none. */
static __always_inline __u32 l4_checksum_at(const struct packet *p)
{
	if (p->fragment == LB_LATER_FRAGMENT)
		return 0;
	if (p->tuple.proto == LB_IPPROTO_TCP)
		return p->l4 + __builtin_offsetof(struct tcp_header, checksum);
	if (p->tuple.proto == LB_IPPROTO_UDP)
		return p->l4 + __builtin_offsetof(struct udp_header, checksum);
	return 0;
}

/* Changes a checksum over a pseudo header by the difference between addresses. */
static __always_inline long l4_replace_addresses(struct __sk_buff *skb, __u32 at, __u32 difference,
						 __u64 flags, bool ipv4)
{
	flags |= BPF_F_PSEUDO_HDR;
	if (!ipv4 && !bpf_l4_csum_replace(skb, at, 0, difference, flags | LB_F_IPV6))
		return 0;
	return bpf_l4_csum_replace(skb, at, 0, difference, flags);
}

/* Writes addresses into the IP header at l3; false where it is not there. */
static __always_inline bool ip_write(struct __sk_buff *skb, __u32 l3, bool ipv4,
				     const __be32 src[4], const __be32 dst[4], __u32 difference)
{
	void *data = skb_data(skb), *data_end = skb_end(skb);

	if (ipv4) {
		struct ipv4_header *ip = packet_at(data, l3);

		if ((void *)(ip + 1) > data_end)
			return false;
		ip->src = src[3];
		ip->dst = dst[3];
		ip->checksum = csum_grown(ip->checksum, difference);
	} else {
		struct ipv6_header *ip = packet_at(data, l3);

		if ((void *)(ip + 1) > data_end)
			return false;
		address_copy(ip->src, src);
		address_copy(ip->dst, dst);
	}
	return true;
}

/* Changes the checksum over ports and addresses. The helper knows what the field holds: a
 * checksum, or a sum for the device to go on from, which covers no ports. What it has done tells
 * the two apart, so that it need not be asked again for the ports.
 */
static __always_inline bool l4_checksum_update(struct __sk_buff *skb, const struct packet *p,
					       __u32 at, __u32 addresses, __u32 from, __u32 want)
{
	__u64 flags = p->tuple.proto == LB_IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	__u16 *checksum = packet_at(skb_data(skb), at), before, grown;

	if ((void *)(checksum + 1) > skb_end(skb))
		return false;
	before = *checksum;
	if (l4_replace_addresses(skb, at, addresses, flags, p->ipv4))
		return false;
	if (from == want)
		return true;
	checksum = packet_at(skb_data(skb), at);
	if ((void *)(checksum + 1) > skb_end(skb))
		return false;
	/* It has fallen by what the addresses have grown: a checksum. It has grown too, or is
	 * none at all, over IPv4: nothing to do. Where they add up to the same as before, nothing
	 * can be told.
	 */
	grown = csum_fold(addresses);
	if (!csum_rest(grown))
		return !bpf_l4_csum_replace(skb, at, from, want, flags | sizeof(__u32));
	if (csum_rest(csum_fold((__u32)*checksum + grown)) != csum_rest(before))
		return true;
	*checksum = csum_grown(*checksum, csum_short((__u64)want + (__u32)~from));
	if (flags && !*checksum)
		*checksum = 0xffff;
	return true;
}

/* Gives a packet another address: a destination where it comes in, a source where it leaves. */
static __always_inline bool address_write(struct __sk_buff *skb, const struct packet *p,
					  const __be32 addr[4], __u8 stage, __u32 difference)
{
	void *l3 = packet_at(skb_data(skb), p->l3), *data_end = skb_end(skb);

	if (p->ipv4) {
		struct ipv4_header *ip = l3;

		if ((void *)(ip + 1) > data_end)
			return false;
		if (stage == LB_STAGE_INGRESS)
			ip->dst = addr[3];
		else
			ip->src = addr[3];
		ip->checksum = csum_grown(ip->checksum, difference);
	} else {
		struct ipv6_header *ip = l3;

		if ((void *)(ip + 1) > data_end)
			return false;
		address_copy(stage == LB_STAGE_INGRESS ? ip->dst : ip->src, addr);
	}
	return true;
}

/* Turns a packet into what its flow says. false: it could not be done, and must not go on. */
static __always_inline bool rewrite(struct __sk_buff *skb, const struct packet *p,
				    const struct flow *to, __u8 stage)
{
	const __be32 *was = stage == LB_STAGE_INGRESS ? p->tuple.dst : p->tuple.src;
	__u32 difference = address_change(was, to->addr, p->ipv4);
	__u32 checksum_at = l4_checksum_at(p);
	struct l4_ports from = {p->tuple.sport, p->tuple.dport};
	struct l4_ports want = {to->sport, to->dport};
	__u32 had = *(__u32 *)&from, wanted = *(__u32 *)&want;
	struct l4_ports *l4;

	if (checksum_at && !l4_checksum_update(skb, p, checksum_at, difference, had, wanted))
		return false;
	if (!address_write(skb, p, to->addr, stage, difference))
		return false;
	if (p->fragment == LB_LATER_FRAGMENT || had == wanted)
		return true;
	l4 = packet_at(skb_data(skb), p->l4);
	if ((void *)(l4 + 1) > skb_end(skb))
		return false;
	*l4 = want;
	if (p->tuple.proto == LB_IPPROTO_SCTP)
		return sctp_update(skb, p, had ^ wanted);
	return true;
}

#endif
