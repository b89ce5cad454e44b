/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * The packet path: what the socket hooks do not see. Destinations are rewritten where
 * a packet comes into the node, sources where it leaves, by the rows of its flow; the
 * first packet of a flow to a service makes them.
 */
#include "tc.h"

/* Whether a packet that leaves the node is one that a service drops: sent by a socket
 * that was left alone for that reason, it must not find its way to somebody who answers.
 * Only what may begin a flow is looked at.
 */
static __always_inline bool must_not_leave(const struct packet *p, struct work *w)
{
	if (!may_begin_flow(p))
		return false;
	address_copy(w->key.addr, p->tuple.dst);
	w->key.port = p->tuple.dport;
	w->key.proto = p->tuple.proto;
	w->key.scope = LB_SCOPE_ADDRESS;
	if (!frontend_read(&w->key, &w->fe))
		return false;
	if (!w->fe.slot_count && (w->fe.flags & LB_FRONTEND_DROP))
		return true;
	return (w->fe.flags & LB_FRONTEND_SOURCE_RANGES) &&
	       !source_is_allowed(w->fe.service, p->tuple.src);
}

/* Whether a packet is surely no service's: it has no row, and no frontend is looked for that is
 * there. What only some have is not asked about.
 */
static __always_inline bool is_nobodys(const struct packet *p, __u8 place)
{
	if (p->icmp_error | p->tunnel | p->fragment)
		return false;
	if (!pair_has_no_flow(&p->tuple))
		return false;
	if (place != LB_FROM_OUTSIDE && !may_begin_flow(p))
		return true;
	if (!address_has_no_frontend(p->tuple.dst))
		return false;
	return place == LB_TO_ANY || is_stranger(p->tuple.dst) ||
	       port_is_no_node_port(p->tuple.dport);
}

/* What every packet goes through. What only some need is in programs of their own, so
 * that this one stays small; should they be missing, the packet stays as it is.
 */
static __always_inline int tc_serve(struct __sk_buff *skb, __u8 place)
{
	struct packet p = {};
	struct work *w;
	struct flow *row;
	__u32 now;

	/* To everyone, or somebody else's on a device that listens to everything. */
	if (place == LB_FROM_OUTSIDE && skb->pkt_type != LB_PACKET_HOST)
		return LB_NEXT;
	if (!tc_parse(skb, &p))
		return LB_NEXT;
	p.tuple.stage = place == LB_TO_ANY ? LB_STAGE_EGRESS : LB_STAGE_INGRESS;
	/* Nothing but what answers a masqueraded flow. */
	if (place == LB_FROM_PORT ? p.tunnel || !node_address_find(p.tuple.dst)
				  : is_nobodys(&p, place))
		return LB_NEXT;
	w = work_begin();
	if (!w)
		return LB_NEXT;
	w->place = place;
	if (p.icmp_error || (p.tunnel && place != LB_TO_ANY)) {
		if (p.icmp_error)
			tails.call(skb, LB_TAIL_ICMP_ERROR);
		else
			tails.call(skb, LB_TAIL_UNTUNNEL);
		return LB_NEXT;
	}
	if (p.tunnel)
		return LB_NEXT;
	if (p.fragment && !fragment_ports(&p)) {
		counter_bump(LB_COUNTER_FRAGMENT_LOST);
		return LB_NEXT;
	}

	now = tick_now();
	row = flow_find(&p.tuple, now);
	if (row && place != LB_TO_ANY && (row->state & LB_FLOW_ORIGINAL) &&
	    !flow_still_holds(&p, row, w))
		row = NULL;
	/* A closed flow's: the client now talks to the backend itself, from the same port. */
	if (row && place == LB_TO_ANY && (p.tcp_flags & LB_TCP_SYN) && flow_is_closed(row->state)) {
		flow_forget(&p.tuple);
		row = NULL;
	}
	if (row && (!(row->state & LB_FLOW_TUNNEL) || flow_is_held(row->state))) {
		w->to = *row;
		flow_track(&p.tuple, row, p.tcp_flags, now,
			   place == LB_TO_ANY	   ? LB_COUNT_ANSWERS
			   : place == LB_FROM_PORT ? LB_COUNT_NOTHING
						   : LB_COUNT_ASKED);
		if (w->to.state & LB_FLOW_TUNNEL)
			return LB_NEXT;
		return tc_rewrite(skb, &p, &w->to, p.tuple.stage);
	}
	if (place == LB_FROM_PORT)
		return LB_NEXT;
	if (place == LB_TO_ANY)
		return must_not_leave(&p, w) ? LB_DROP : LB_NEXT;
	/* What pods send is looked at once a connection: most of it is no service's. */
	if (!row && place == LB_FROM_INSIDE && !may_begin_flow(&p))
		return LB_NEXT;
	if (!row && !frontend_of_packet(&p, &w->key, &w->fe))
		return LB_NEXT;
	w->known = !row;
	tails.call(skb, LB_TAIL_OPEN);
	return LB_NEXT;
}

int lb_tc_from_outside(struct __sk_buff *skb)
{
	return tc_serve(skb, LB_FROM_OUTSIDE);
}

int lb_tc_from_inside(struct __sk_buff *skb)
{
	return tc_serve(skb, LB_FROM_INSIDE);
}

/* Where netfilter sees frames as a bridge takes them in, before the bridge's own device does:
 * there an answer to a masqueraded client would begin a connection that nobody has asked for.
 */
int lb_tc_from_port(struct __sk_buff *skb)
{
	return tc_serve(skb, LB_FROM_PORT);
}

int lb_tc_to_any(struct __sk_buff *skb)
{
	return tc_serve(skb, LB_TO_ANY);
}
