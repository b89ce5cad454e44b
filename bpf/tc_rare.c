/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * What only some packets need: programs that those at the hooks go on with by a tail
 * call. Each parses the packet anew; struct work hands over what was found out.
 */
#include "icmp_error.h"
#include "reject.h"
#include "tc.h"
#include "tunnel.h"

/* Parses a packet anew, in the program that is to go on with it. */
static __always_inline bool tc_parse_again(struct __sk_buff *skb, struct packet *p, struct work *w)
{
	if (!tc_parse(skb, p))
		return false;
	p->tuple.stage = w->place == LB_TO_ANY ? LB_STAGE_EGRESS : LB_STAGE_INGRESS;
	return true;
}

/* Packets to a service whose flow has no row, or one that says to tunnel them. */
int lb_tc_open(struct __sk_buff *skb)
{
	struct packet p = {};
	struct work *w = work_begin();
	__u32 now = tick_now();
	struct flow *row;
	int what;

	if (!w || !tc_parse_again(skb, &p, w) || (p.fragment && !fragment_ports(&p)))
		return LB_NEXT;
	row = w->known ? NULL : flow_find(&p.tuple, now);
	if (row && (row->state & LB_FLOW_HELD) == LB_FLOW_TUNNEL && flow_still_holds(&p, row, w)) {
		w->to = *row;
		flow_track(&p.tuple, row, p.tcp_flags, now, LB_COUNT_NOTHING);
		what = LB_TUNNEL;
	} else {
		what = flow_open(skb, skb->ifindex, w->place == LB_FROM_INSIDE, &p, w, now);
	}
	if (what == LB_TRANSLATE)
		return tc_rewrite(skb, &p, &w->to, LB_STAGE_INGRESS);
	if (what == LB_LEAVE)
		return LB_NEXT;
	if (what == LB_TUNNEL)
		tails.call(skb, LB_TAIL_TUNNEL);
	w->mtu = 0;
	/* There is no header in a later fragment to answer to (RFC 1122, 3.2.2). */
	if (what == LB_REJECT && p.fragment != LB_LATER_FRAGMENT)
		tails.call(skb, LB_TAIL_ANSWER);
	return LB_DROP;
}

/* Sends a packet to the backend that w->to names, inside another one. */
int lb_tc_tunnel(struct __sk_buff *skb)
{
	struct packet p = {};
	struct work *w = work_begin();
	int verdict;

	if (!w || !tc_parse_again(skb, &p, w))
		return LB_DROP;
	verdict = encapsulate(skb, &p, w);
	if (verdict != LB_TOO_BIG)
		return verdict;
	/* Nobody is told about an error. */
	if (!p.icmp_error && p.fragment != LB_LATER_FRAGMENT)
		tails.call(skb, LB_TAIL_ANSWER);
	return LB_DROP;
}

/* Tells the sender that its packet is too big for w->mtu, or with 0 that nobody answers. */
int lb_tc_answer(struct __sk_buff *skb)
{
	struct packet p = {};
	struct work *w = work_begin();

	if (!w || !tc_parse_again(skb, &p, w))
		return LB_DROP;
	if (p.tuple.proto == LB_IPPROTO_TCP && !w->mtu)
		return reject_tcp(skb, &p);
	return answer_icmp(skb, &p, w->mtu);
}

/* An ICMP error, whether about a flow that has rows here or about one that has none,
 * since its backend's node answers the client itself.
 */
static __always_inline int tc_icmp_error(struct __sk_buff *skb, struct packet *p, struct work *w)
{
	int what = icmp_error(skb, p, w);
	struct backend *to;
	__u32 id;

	if (what == LB_SHOOT)
		return LB_DROP;
	if (what == LB_TRANSLATE)
		return LB_NEXT;
	if (what != LB_TUNNEL) {
		/* One that another node has sent here already must not go round in circles. */
		if (p->tuple.stage != LB_STAGE_INGRESS || w->place == LB_FROM_TUNNEL ||
		    !w->flow_key.proto)
			return LB_NEXT;
		p->tuple = w->flow_key;
		if (!frontend_of_packet(p, &w->key, &w->fe) || !(w->fe.flags & LB_FRONTEND_DSR) ||
		    !w->fe.slot_count)
			return LB_NEXT;
		id = slot_at(&w->fe, hash_mix(flow_hash(p)));
		to = backends.lookup(&id);
		if (!to || to->service != w->fe.service || is_on_this_node(to))
			return LB_NEXT;
		address_copy(w->to.addr, to->addr);
		w->to.dport = to->port;
	}
	tails.call(skb, LB_TAIL_TUNNEL);
	return LB_DROP;
}

int lb_tc_icmp_error(struct __sk_buff *skb)
{
	struct packet p = {};
	struct work *w = work_begin();

	if (!w || !tc_parse_again(skb, &p, w) || !p.icmp_error)
		return LB_NEXT;
	packet_forget(skb, &p);
	return tc_icmp_error(skb, &p, w);
}

/* Whether a tunnel's packet leads to a backend of this node, and not through here to
 * somebody else's.
 */
static __always_inline bool tunnel_ends_here(struct __sk_buff *skb, const struct packet *p,
					     const struct flow *to)
{
	__u32 device = route_device(skb, skb->ifindex, p->tuple.src, to->addr, p->ipv4);

	return device ? device != skb->ifindex : node_address_find(to->addr) != NULL;
}

/* The flow that the packet inside a tunnel belongs to: w->flow_key receives it. */
static __always_inline bool tunnelled_flow(struct __sk_buff *skb, struct packet *inner,
					   struct work *w)
{
	struct packet quoted = {};
	__u16 kind;

	if (inner->icmp_error) {
		if (!parse_quoted(skb, inner, &quoted, &kind))
			return false;
		turn_round(&quoted.tuple, LB_STAGE_INGRESS, &w->flow_key);
		return true;
	}
	if (inner->fragment && !fragment_ports(inner)) {
		counter_bump(LB_COUNTER_FRAGMENT_LOST);
		return false;
	}
	w->flow_key = inner->tuple;
	return true;
}

/* Takes a packet that another node has sent for a backend of this one out of its
 * tunnel; w->to says which backend. Anybody else's tunnel stays as it is.
 */
int lb_tc_untunnel(struct __sk_buff *skb)
{
	struct packet p = {}, inner = {};
	struct work *w = work_begin();
	__u8 error;

	if (!w || !tc_parse_again(skb, &p, w) || !p.tunnel)
		return LB_NEXT;
	packet_forget(skb, &p);
	if (!tunnel_end(skb, &p, &w->to) || !parse_inner(skb, &p, &inner) ||
	    !tunnel_ends_here(skb, &p, &w->to) || !tunnelled_flow(skb, &inner, w) ||
	    !tunnelled_frontend(&w->flow_key, inner.ipv4, w))
		return LB_NEXT;
	/* The node that sent it has looked, if it was one. */
	if (!may_send(w->flow_key.src) || ((w->fe.flags & LB_FRONTEND_SOURCE_RANGES) &&
					   !source_is_allowed(w->fe.service, w->flow_key.src))) {
		counter_bump(LB_COUNTER_SOURCE_DENIED);
		return LB_DROP;
	}
	error = inner.icmp_error;
	if (!decapsulate(skb, &inner)) {
		counter_bump(LB_COUNTER_BAD_TUNNEL);
		return LB_DROP;
	}
	w->place = LB_FROM_TUNNEL;
	if (error)
		tails.call(skb, LB_TAIL_ICMP_ERROR);
	else
		tails.call(skb, LB_TAIL_UNTUNNELLED);
	return LB_DROP;
}

/* Whether a row is that of a packet which came out of a tunnel for the backend that w->to
 * names. Where segments were cut behind the node that has sent them, the IPv4
 * identification was counted up, and the port in it with it: so it counts exactly for what
 * begins a connection only, which is never cut.
 */
static __always_inline bool is_row_of_tunnelled(const struct packet *p, const struct flow *row,
						const struct flow *to)
{
	__u16 segment = bpf_ntohs(to->dport) - bpf_ntohs(row->dport);

	if (!address_equal(row->addr, to->addr))
		return false;
	if (p->tuple.proto != LB_IPPROTO_TCP)
		return p->ipv4 ? segment < LB_MOST_SEGMENTS : !segment;
	if (!may_begin_flow(p))
		return p->ipv4 || !segment;
	return !segment && !flow_is_closed(row->state);
}

/* What was in a tunnel, for the backend that w->to names; w->fe is its frontend. */
int lb_tc_untunnelled(struct __sk_buff *skb)
{
	struct packet p = {};
	struct work *w = work_begin();
	__u32 now = tick_now();
	struct tunnel_end *end;
	struct flow *row;

	if (!w || !tc_parse_again(skb, &p, w) || (p.fragment && !fragment_ports(&p)))
		return LB_DROP;
	row = flow_find(&p.tuple, now);
	if (row && is_row_of_tunnelled(&p, row, &w->to)) {
		w->to = *row;
		flow_track(&p.tuple, row, p.tcp_flags, now, LB_COUNT_ASKED);
		return tc_rewrite(skb, &p, &w->to, LB_STAGE_INGRESS);
	}
	end = tunnel_end_open(w);
	if (!end) {
		counter_bump(LB_COUNTER_BAD_TUNNEL);
		return LB_DROP;
	}
	if (open_tunnelled(&p, end, w, now))
		return tc_rewrite(skb, &p, &w->to, LB_STAGE_INGRESS);
	counter_bump(LB_COUNTER_FLOW_FAILED);
	return LB_DROP;
}
