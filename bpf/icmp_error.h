/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * ICMP errors about translated packets: whoever gets one is shown the packet that it
 * has sent itself. An error quotes a packet of the other direction, so the row that
 * its answer would follow says how to translate both.
 */
#ifndef LB_ICMP_ERROR_H
#define LB_ICMP_ERROR_H

#include "flow.h"
#include "open.h"
#include "rewrite.h"

#define LB_ICMP_QUOTE 8 /* bytes of ICMP header before the quoted packet */
#define LB_L4_QUOTED 8	/* bytes behind the quoted packet's headers that there must be */
#define LB_ICMP_REDIRECT 5
/* "Port unreachable": type and code. */
#define LB_ICMP_NOBODY_LISTENS (3 << 8 | 3)
#define LB_ICMP6_NOBODY_LISTENS (1 << 8 | 4)

/* The quoted packet, turned round: as an answer to it would be seen. *kind receives type and code.
 */
static __always_inline bool parse_quoted(struct __sk_buff *skb, const struct packet *p,
					 struct packet *quoted, __u16 *kind)
{
	void *data = skb_data(skb), *data_end = skb_end(skb);
	struct icmp_header *icmp = packet_at(data, p->l4);

	if ((void *)(icmp + 1) > data_end)
		return false;
	*kind = icmp->type << 8 | icmp->code;
	quoted->l3 = p->l4 + LB_ICMP_QUOTE;
	quoted->ipv4 = p->ipv4;
	if (!(p->ipv4 ? parse_ipv4(data, data_end, quoted) : parse_ipv6(data, data_end, quoted)))
		return false;
	packet_forget(skb, quoted);
	/* What is behind the error in its frame is not quoted. */
	return parse_l4(data, data_end, quoted, true) && quoted->l4 + LB_L4_QUOTED <= p->end;
}

static __always_inline void turn_round(const struct flow_key *from, __u8 stage, struct flow_key *to)
{
	address_copy(to->src, from->dst);
	address_copy(to->dst, from->src);
	to->sport = from->dport;
	to->dport = from->sport;
	to->proto = from->proto;
	to->stage = stage;
	to->pad[0] = 0;
	to->pad[1] = 0;
}

static __always_inline bool rewrite_quoted(struct __sk_buff *skb, const struct packet *quoted,
					   const struct ends *to, __u32 difference)
{
	struct l4_ports *l4;

	if (!ip_write(skb, quoted->l3, quoted->ipv4, to->dst, to->src, difference))
		return false;
	l4 = packet_at(skb_data(skb), quoted->l4);
	if ((void *)(l4 + 1) > skb_end(skb))
		return false;
	l4->source = to->dport;
	l4->destination = to->sport;
	return true;
}

/* Translates an ICMP error, if it is about a flow. LB_LEAVE: it is about none, and
 * w->flow_key says which it would be. LB_TUNNEL: w->to says who has to translate it.
 */
static __always_inline int icmp_error(struct __sk_buff *skb, const struct packet *p, struct work *w)
{
	struct packet quoted = {};
	__be32 src[4], dst[4];
	struct l4_ports from, want;
	__u32 inner, outer, at = p->l4 + __builtin_offsetof(struct icmp_header, checksum);
	struct flow_key *key = &w->flow_key;
	struct flow *row;
	struct ends to;
	__u16 kind = 0;

	key->proto = 0;
	if (!parse_quoted(skb, p, &quoted, &kind))
		return LB_LEAVE;
	turn_round(&quoted.tuple, p->tuple.stage, key);
	/* It is for whoever has sent what it quotes. */
	if (!address_equal(p->tuple.dst, key->dst)) {
		key->proto = 0;
		return LB_LEAVE;
	}
	row = flow_find(key, tick_now());
	if (!row)
		return LB_LEAVE;
	/* The kernel translates it as it does the flow. */
	if (flow_is_held(row->state)) {
		key->proto = 0;
		return LB_LEAVE;
	}
	/* It advises a route for an address that its receiver does not know. */
	if (p->ipv4 && kind >> 8 == LB_ICMP_REDIRECT)
		return LB_SHOOT;
	if (kind == (p->ipv4 ? LB_ICMP_NOBODY_LISTENS : LB_ICMP6_NOBODY_LISTENS))
		flow_unreachable(key, row);
	w->to = *row;
	if (w->to.state & LB_FLOW_TUNNEL)
		return LB_TUNNEL;
	flow_ends(key, &w->to, &to);
	address_copy(src, p->tuple.src);
	address_copy(dst, p->tuple.dst);
	if (p->tuple.stage == LB_STAGE_INGRESS)
		address_copy(dst, to.dst);
	else if (address_equal(src, key->src))
		address_copy(src, to.src);

	inner = address_difference(&quoted, to.dst, to.src);
	outer = address_difference(p, src, dst);
	from.source = quoted.tuple.sport;
	from.destination = quoted.tuple.dport;
	want.source = to.dport;
	want.destination = to.sport;
	if (*(__u32 *)&from != *(__u32 *)&want &&
	    bpf_l4_csum_replace(skb, at, *(__u32 *)&from, *(__u32 *)&want, sizeof(__u32)))
		goto mangled;
	/* The quoted header's own checksum makes up for its addresses; IPv6 has none. */
	if (!p->ipv4 && (bpf_l4_csum_replace(skb, at, 0, inner, 0) ||
			 l4_replace_addresses(skb, at, outer, 0, false)))
		goto mangled;
	if (rewrite_quoted(skb, &quoted, &to, inner) &&
	    ip_write(skb, p->l3, p->ipv4, src, dst, outer))
		return LB_TRANSLATE;
mangled:
	counter_bump(LB_COUNTER_MANGLED);
	return LB_SHOOT;
}

#endif
