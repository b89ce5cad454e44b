/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * From bytes to struct packet: who sends it to whom, and where its headers begin.
 * All bounds checks on what comes from the wire are here. What can not be
 * understood is nobody's flow, and is left to the kernel as it came.
 */
#ifndef LB_PACKET_H
#define LB_PACKET_H

#include "address.h"

#define LB_IPPROTO_ICMP 1
#define LB_IPPROTO_IPIP 4
#define LB_IPPROTO_IPV6 41
#define LB_IPPROTO_ICMPV6 58
#define LB_IPPROTO_SCTP 132
#define LB_IPPROTO_HOP_BY_HOP 0
#define LB_IPPROTO_ROUTING 43
#define LB_IPPROTO_FRAGMENT 44
#define LB_IPPROTO_DESTINATION 60

#define LB_ETH_IPV4 0x0800
#define LB_ETH_IPV6 0x86dd

#define LB_TCP_FIN 0x01
#define LB_TCP_SYN 0x02
#define LB_TCP_RST 0x04
#define LB_TCP_ACK 0x10

#define LB_MOST_EXTENSIONS 6

/* The uapi headers of these go neither together nor with BCC's own. */
struct eth_header {
	__u8 dst[6];
	__u8 src[6];
	__be16 proto;
};

struct ipv4_header {
	__u8 version_ihl;
	__u8 tos;
	__be16 length;
	__be16 id;
	__be16 fragment;
	__u8 ttl;
	__u8 proto;
	__u16 checksum;
	__be32 src;
	__be32 dst;
};

struct ipv6_header {
	__be32 version_flow;
	__be16 length;
	__u8 next;
	__u8 hops;
	__be32 src[4];
	__be32 dst[4];
};

struct ipv6_extension {
	__u8 next;
	__u8 length; /* in 8 bytes, without the first 8 */
	__u8 type;   /* of a routing header */
	__u8 segments_left;
	__be32 fragment_id; /* of a fragment header, whose offset is in the two bytes before */
};

struct l4_ports {
	__be16 source;
	__be16 destination;
};

struct tcp_header {
	struct l4_ports ports;
	__be32 sequence;
	__be32 acknowledged;
	__u8 offset;
	__u8 flags;
	__be16 window;
	__u16 checksum;
	__be16 urgent;
};

struct udp_header {
	struct l4_ports ports;
	__be16 length;
	__u16 checksum;
};

struct sctp_header {
	struct l4_ports ports;
	__be32 tag;
	__u32 checksum;
};

struct icmp_header {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__be16 unused;
	__be16 mtu;
};

/* Which part of a datagram a packet holds. */
#define LB_WHOLE 0
#define LB_FIRST_FRAGMENT 1
#define LB_LATER_FRAGMENT 2 /* no ports in it */

struct packet {
	struct flow_key tuple;
	__u32 l2; /* bytes before the IP header: an Ethernet header, or none */
	__u32 l3; /* offset of the IP header; of the one inside, if it is in another packet */
	__u32 l4;
	__u32 end; /* offset behind the IP packet */
	__u32 fragment_id;
	__u8 fragment;
	__u8 tcp_flags;
	__u8 icmp_error; /* it quotes another packet, at l4 + 8 */
	__u8 ipv4;
	__u8 tunnel; /* it holds another packet of its family, at l4 */
};

#define LB_FARTHEST 0x3f00 /* no header that matters begins behind this */

/* A pointer into a packet, in a form in which the verifier can follow it: one register,
 * with a bound, both for the check against data_end and for what comes after.
 */
static __always_inline void *packet_at(void *data, __u64 at)
{
	void *place;

	asm volatile("" : "+r"(at));
	at &= 0x3fff;
	place = data + at;
	asm volatile("" : "+r"(place));
	return place;
}

/* Where the linear part of a packet begins and ends. Read by hand: the compiler would keep
 * the address of the field in a register, which the verifier does not take.
 */
static __always_inline void *skb_data(struct __sk_buff *skb)
{
	void *place;

	asm volatile("%0 = *(u32 *)(%1 + %2)"
		     : "=r"(place)
		     : "r"(skb), "i"(__builtin_offsetof(struct __sk_buff, data)));
	return place;
}

static __always_inline void *skb_end(struct __sk_buff *skb)
{
	void *place;

	asm volatile("%0 = *(u32 *)(%1 + %2)"
		     : "=r"(place)
		     : "r"(skb), "i"(__builtin_offsetof(struct __sk_buff, data_end)));
	return place;
}

static __always_inline bool icmp_is_error(__u8 proto, __u8 type)
{
	if (proto == LB_IPPROTO_ICMP)
		return type == 3 || type == 4 || type == 5 || type == 11 || type == 12;
	return type >= 1 && type <= 4;
}

/* Whether a packet may be the first of a flow. */
static __always_inline bool may_begin_flow(const struct packet *p)
{
	return p->tuple.proto != LB_IPPROTO_TCP ||
	       (p->tcp_flags & (LB_TCP_SYN | LB_TCP_ACK)) == LB_TCP_SYN;
}

static __always_inline bool parse_ipv4(void *data, void *data_end, struct packet *p)
{
	struct ipv4_header *ip = packet_at(data, p->l3);
	__u32 header, length;
	__u16 fragment;

	if ((void *)(ip + 1) > data_end || ip->version_ihl >> 4 != 4)
		return false;
	header = (ip->version_ihl & 0xf) * 4;
	length = bpf_ntohs(ip->length);
	/* Packets of more than 64 KB are announced as 0. */
	if (header < sizeof(*ip) || (length && length < header))
		return false;
	address_from_v4(p->tuple.src, ip->src);
	address_from_v4(p->tuple.dst, ip->dst);
	p->tuple.proto = ip->proto;
	p->l4 = p->l3 + header;
	if (length)
		p->end = p->l3 + length;
	fragment = bpf_ntohs(ip->fragment);
	p->fragment_id = ip->id;
	if (fragment & 0x1fff)
		p->fragment = LB_LATER_FRAGMENT;
	else if (fragment & 0x2000)
		p->fragment = LB_FIRST_FRAGMENT;
	return true;
}

static __always_inline bool parse_ipv6(void *data, void *data_end, struct packet *p)
{
	struct ipv6_header *ip = packet_at(data, p->l3);
	struct ipv6_extension *extension;
	__u32 at = p->l3 + sizeof(*ip), length;
	__u16 offset;
	__u8 next;

	if ((void *)(ip + 1) > data_end || (bpf_ntohl(ip->version_flow) >> 28) != 6)
		return false;
	/* They would be taken for IPv4's, which these stand for, and are on no wire. */
	if (address_is_v4(ip->src) || address_is_v4(ip->dst))
		return false;
	address_copy(p->tuple.src, ip->src);
	address_copy(p->tuple.dst, ip->dst);
	next = ip->next;
	length = bpf_ntohs(ip->length);
	if (length)
		p->end = at + length;

	for (int i = 0; i < LB_MOST_EXTENSIONS; i++) {
		if (next != LB_IPPROTO_HOP_BY_HOP && next != LB_IPPROTO_ROUTING &&
		    next != LB_IPPROTO_DESTINATION && next != LB_IPPROTO_FRAGMENT)
			break;
		if (at > LB_FARTHEST)
			return false;
		extension = packet_at(data, at);
		if ((void *)(extension + 1) > data_end)
			return false;
		if (next == LB_IPPROTO_FRAGMENT) {
			offset = (extension->type << 8) | extension->segments_left;
			p->fragment_id = extension->fragment_id;
			next = extension->next;
			at += sizeof(*extension);
			if (offset & 0xfff8) {
				p->fragment = LB_LATER_FRAGMENT;
				break;
			}
			if (offset & 1)
				p->fragment = LB_FIRST_FRAGMENT;
			continue;
		}
		/* Not at its destination yet. */
		if (next == LB_IPPROTO_ROUTING && extension->segments_left)
			return false;
		next = extension->next;
		at += (extension->length + 1) * 8;
	}
	p->tuple.proto = next;
	p->l4 = at;
	return true;
}

/* Reads the ports, and what of the header behind them matters. `quoted` is a packet
 * that an ICMP error quotes: the first 8 bytes of its header may be all there is.
 */
static __always_inline bool parse_l4(void *data, void *data_end, struct packet *p, bool quoted)
{
	void *l4 = packet_at(data, p->l4);

	if (p->l4 > LB_FARTHEST)
		return false;
	if (p->fragment == LB_LATER_FRAGMENT)
		return !quoted &&
		       (p->tuple.proto == LB_IPPROTO_TCP || p->tuple.proto == LB_IPPROTO_UDP ||
			p->tuple.proto == LB_IPPROTO_SCTP);
	switch (p->tuple.proto) {
	case LB_IPPROTO_TCP: {
		struct tcp_header *tcp = l4;

		if (quoted)
			break;
		if ((void *)(tcp + 1) > data_end || p->l4 + sizeof(*tcp) > p->end)
			return false;
		p->tcp_flags = tcp->flags;
		break;
	}
	case LB_IPPROTO_UDP:
		break;
	case LB_IPPROTO_SCTP:
		if (quoted)
			break;
		if (l4 + sizeof(struct sctp_header) > data_end ||
		    p->l4 + sizeof(struct sctp_header) > p->end)
			return false;
		break;
	case LB_IPPROTO_ICMP:
	case LB_IPPROTO_ICMPV6: {
		struct icmp_header *icmp = l4;

		if (quoted || (p->tuple.proto == LB_IPPROTO_ICMP) != p->ipv4)
			return false;
		if ((void *)(icmp + 1) > data_end || p->fragment ||
		    !icmp_is_error(p->tuple.proto, icmp->type))
			return false;
		p->icmp_error = 1;
		return true;
	}
	case LB_IPPROTO_IPIP:
	case LB_IPPROTO_IPV6:
		if (quoted || p->fragment || (p->tuple.proto == LB_IPPROTO_IPIP) != p->ipv4)
			return false;
		p->tunnel = 1;
		return true;
	default:
		return false;
	}
	if (l4 + sizeof(struct udp_header) > data_end ||
	    (!quoted && p->l4 + sizeof(struct udp_header) > p->end))
		return false;
	p->tuple.sport = ((struct l4_ports *)l4)->source;
	p->tuple.dport = ((struct l4_ports *)l4)->destination;
	return true;
}

/* Makes the verifier forget by which way a packet was parsed: else it follows whatever comes
 * next once for each. `zero` is one of which it does not know that.
 */
static __always_inline void packet_forget_by(__u32 zero, struct packet *p)
{
	p->l4 |= zero;
	p->end |= zero;
	p->fragment_id |= zero;
	p->tuple.proto |= zero;
	p->fragment |= zero;
	p->tcp_flags |= zero;
	p->icmp_error |= zero;
	p->ipv4 |= zero;
	p->tunnel |= zero;
	asm volatile("" : : : "memory");
}

/* A protocol has 16 bits, which the verifier does not know. */
static __always_inline void packet_forget(struct __sk_buff *skb, struct packet *p)
{
	packet_forget_by(skb->protocol >> 16, p);
}

/* Whether this is a packet that may belong to a flow, an ICMP error or a tunnel's; then
 * p says all about it. `length` is that of the frame, of which data may hold the
 * beginning; its IP header, of the protocol that it has on Ethernet, is at `l2`.
 */
static __always_inline bool packet_parse(void *data, void *data_end, __u32 length, __u32 l2,
					 __be16 proto, struct packet *p)
{
	p->l2 = l2;
	p->l3 = l2;
	p->end = length;
	if (proto == bpf_htons(LB_ETH_IPV4)) {
		p->ipv4 = 1;
		if (!parse_ipv4(data, data_end, p))
			return false;
	} else if (proto == bpf_htons(LB_ETH_IPV6)) {
		if (!parse_ipv6(data, data_end, p))
			return false;
	} else {
		return false;
	}
	/* Cut off on its way, or with headers that go on behind its end. */
	if (p->end > length || p->l4 > p->end)
		return false;
	return parse_l4(data, data_end, p, false);
}

#endif
