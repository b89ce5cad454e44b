/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * The first packet of a flow to a service address: which backend it gets, whether it
 * is masqueraded, and the rows that the packets after it follow.
 *
 * The rows of replies are written first and the one that this packet's successors
 * find last, so that nothing is sent whose answer would not be understood.
 */
#ifndef LB_OPEN_H
#define LB_OPEN_H

#include "frontend.h"
#include "masquerade.h"
#include "select.h"

/* What is to be done with a packet. */
#define LB_LEAVE 0     /* nothing: it is no service's */
#define LB_TRANSLATE 1 /* as the flow says */
#define LB_SHOOT 2     /* drop it; counted already */
#define LB_REJECT 3    /* drop it and tell the sender */
#define LB_TUNNEL 4    /* to the backend as it is, inside another packet */

#define LB_MOST_CLIENT_PORTS 4

/* What a program makes of a packet; in the scratch map. */
struct work {
	struct flow to;		 /* what the packet becomes */
	struct frontend fe;	 /* of a new flow */
	struct frontend_key key; /* under which that was found */
	struct flow_key flow_key;
	struct flow flow;
	struct affinity_key client;
	__u32 place;	  /* where it is seen */
	__u32 mtu;	  /* of the way to its backend, where that is too small */
	bool known;	  /* fe and key are those of this packet, whose flow has no row */
	bool outside_row; /* fe is the row for clients outside */
	bool pod;
};

static __always_inline struct work *work_begin(void)
{
	__u32 cpu = bpf_get_smp_processor_id();
	struct work *w;

	_Static_assert(sizeof(struct work) <= sizeof(struct scratch), "work fits into scratch");
	w = (struct work *)scratch.lookup(&cpu);
	if (w) {
		/* Nobody sets these, and another version may have left something there. */
		w->flow_key.pad[0] = 0;
		w->flow_key.pad[1] = 0;
	}
	return w;
}

static __always_inline bool node_port_read(bool ipv4, struct frontend_key *key, struct frontend *fe)
{
	key->addr[0] = 0;
	key->addr[1] = 0;
	key->addr[2] = ipv4 ? bpf_htonl(0xffff) : 0;
	key->addr[3] = 0;
	key->scope = LB_SCOPE_NODE_PORT;
	return frontend_read(key, fe);
}

/* Copies the frontend that a packet is addressed to. */
static __always_inline bool frontend_of_packet(const struct packet *p, struct frontend_key *key,
					       struct frontend *fe)
{
	struct node_address *node;

	address_copy(key->addr, p->tuple.dst);
	key->port = p->tuple.dport;
	key->proto = p->tuple.proto;
	key->scope = LB_SCOPE_ADDRESS;
	if (frontend_read(key, fe))
		return true;
	node = node_address_find(key->addr);
	if (!node || !(node->flags & LB_NODE_ADDRESS_NODE_PORTS))
		return false;
	return node_port_read(p->ipv4, key, fe);
}

/* What identifies a flow to a Maglev table: the same on every node. */
static __always_inline __u64 flow_hash(const struct packet *p)
{
	const __be32 *src = p->tuple.src, *dst = p->tuple.dst;
	__u64 hash = ((__u64)src[0] << 32 | src[1]) * 0x9e3779b97f4a7c15ULL;

	hash ^= ((__u64)src[2] << 32 | src[3]) * 0xc2b2ae3d27d4eb4fULL;
	hash ^= (((__u64)dst[0] << 32 | dst[1]) ^ ((__u64)dst[2] << 32 | dst[3])) *
		0x165667b19e3779f9ULL;
	return hash ^ ((__u64)p->tuple.sport << 32 | (__u64)p->tuple.dport << 16 | p->tuple.proto);
}

#include "dsr.h"

/* Whether a new flow is left to another proxy: while its flows are learned, which then is one
 * of them; and while it is given the node back. DSR keeps no row of what it has begun: so
 * there what begins is marked, and what does not goes on. Both at once is the end of the
 * latter: what begins is the other proxy's still, and marked.
 */
static __always_inline bool opening_is_anothers(const struct packet *p, struct work *o, __u32 now)
{
	bool learn = handover_get(LB_HANDOVER_LEARN);

	if (handover_get(LB_HANDOVER_RETURN)) {
		bool unmarked = (o->fe.flags & LB_FRONTEND_DSR) && !o->fe.affinity_s &&
				p->tuple.proto == LB_IPPROTO_TCP;

		if (unmarked && !may_begin_flow(p))
			return false;
		if (!unmarked && !learn) {
			/* What a closed flow has left would take the packets after this one. */
			flow_forget((struct flow_key *)&p->tuple);
			return true;
		}
	} else if (!learn) {
		return false;
	}
	flow_hold(&p->tuple, o->fe.service, &o->flow_key, &o->flow, now);
	return true;
}

/* What becomes of a new flow, up to the choice of its backend. */
static __always_inline int opening_decide(const struct packet *p, __u32 ifindex,
					  const struct settings *set, struct work *o, __u32 now)
{
	if (!o->known && !frontend_of_packet(p, &o->key, &o->fe))
		return LB_LEAVE;
	/* Nobody else may send as this node; the kernel knows such packets by itself. */
	if (!may_send(p->tuple.src) || node_address_find(p->tuple.src))
		return LB_LEAVE;
	/* It has nothing to answer to, and opens nothing. */
	if (p->tcp_flags & LB_TCP_RST)
		return LB_LEAVE;
	if (opening_is_anothers(p, o, now))
		return LB_LEAVE;
	o->pod = is_from_pod(set, p, ifindex);
	o->outside_row = !o->pod && (o->fe.flags & LB_FRONTEND_EXTERNAL_LOCAL);
	if (o->outside_row) {
		o->key.scope |= LB_SCOPE_OUTSIDE;
		if (!frontend_read(&o->key, &o->fe)) {
			counter_bump(LB_COUNTER_DROPPED);
			return LB_SHOOT;
		}
	}
	if (!o->fe.slot_count && !(o->fe.flags & LB_FRONTEND_DROP)) {
		count_refusal(o->fe.service);
		return LB_REJECT;
	}
	if ((o->fe.flags & LB_FRONTEND_SOURCE_RANGES) &&
	    !source_is_allowed(o->fe.service, p->tuple.src)) {
		counter_bump(LB_COUNTER_SOURCE_DENIED);
		return LB_SHOOT;
	}
	if (!o->fe.slot_count) {
		counter_bump(LB_COUNTER_DROPPED);
		return LB_SHOOT;
	}
	/* Of a connection that nobody remembers, where somebody should. */
	if (!may_begin_flow(p) && !(o->fe.flags & LB_FRONTEND_DSR))
		return LB_REJECT;
	return LB_TRANSLATE;
}

/* A walk over the ports to masquerade with: from anywhere, in steps of any width, so that
 * no two flows try the same ones, and no walk the same one twice for long.
 */
struct port_walk {
	__u32 at;
	__u32 step;
};

static __always_inline void walk_begin(struct port_walk *walk)
{
	walk->at = bpf_get_prandom_u32();
	walk->step = bpf_get_prandom_u32() | 1;
}

static __always_inline __be16 walk_next(const struct settings *set, struct port_walk *walk)
{
	__u32 count = set->ports_count;

	walk->at += walk->step;
	return bpf_htons(set->ports_first + (count ? walk->at % count : 0));
}

/* Keeps row D: the backend's answers appear as the service's. The client's port
 * becomes another where the backend has a flow of this client from it already, as
 * through a second frontend, or where the backend sends to itself from the port that it
 * serves: both directions would look the same. w->to.sport receives it.
 */
static __always_inline bool open_reply(const struct packet *p, const struct settings *set,
				       const struct backend *to, struct work *w, __u32 now)
{
	struct flow_key *key = &w->flow_key;
	struct flow *row = &w->flow;
	struct port_walk walk;

	address_copy(key->src, to->addr);
	address_copy(key->dst, p->tuple.src);
	key->sport = to->port;
	key->dport = p->tuple.sport;
	key->proto = p->tuple.proto;
	key->stage = LB_STAGE_EGRESS;
	address_copy(row->addr, p->tuple.dst);
	row->sport = p->tuple.dport;
	row->dport = p->tuple.sport;
	row->backend = syn_now(); /* no branch: the verifier would follow all behind it twice */
	flow_set_service(row, w->fe.service);
	row->seen = now;
	row->state = 0;
#pragma clang loop unroll(disable)
	for (int tries = 0; tries < LB_MOST_CLIENT_PORTS; tries++) {
		if ((key->sport != key->dport || !address_equal(key->src, key->dst)) &&
		    flow_claim(key, row, now)) {
			w->to.sport = key->dport;
			return true;
		}
		if (!tries)
			walk_begin(&walk);
		key->dport = walk_next(set, &walk);
	}
	return false;
}

/* Puts a port into the key of row C that has no row; false if none of many is. */
static __always_inline bool fresh_port(const struct settings *set, struct flow_key *key,
				       struct port_walk *walk)
{
#pragma clang loop unroll(disable)
	for (int tries = 0; tries < LB_MOST_FRESH_PORTS; tries++) {
		key->dport = walk_next(set, walk);
		if (!flow_row(key))
			return true;
	}
	return false;
}

/* The same with one that no flow needs any more. */
static __always_inline bool free_port(const struct settings *set, struct flow_key *key,
				      const struct flow *row, struct port_walk *walk, __u32 now)
{
#pragma clang loop unroll(disable)
	for (int tries = 0; tries < LB_MOST_PORTS_TRIED; tries++) {
		key->dport = walk_next(set, walk);
		if (flow_may_take(key, flow_row(key), row, now))
			return true;
	}
	return false;
}

/* Keeps rows C and B: the flow reaches the backend as this node's, from a port that is
 * neither another flow's nor a socket's.
 */
static __always_inline int open_masquerade(void *ctx, const struct packet *p,
					   const struct settings *set, const struct backend *to,
					   struct work *w, __u32 device, __u32 now)
{
	struct flow_key *key = &w->flow_key;
	struct flow *row = &w->flow;
	struct port_walk walk;
	bool found = false;

	if (!device || !masquerade_address(set, device, p->ipv4, key->dst)) {
		counter_bump(LB_COUNTER_NO_ROUTE);
		return LB_SHOOT;
	}
	/* key and row are still those of row D. */
	key->stage = LB_STAGE_INGRESS;
	address_copy(row->addr, p->tuple.src);
	row->sport = to->port;
	row->dport = w->to.sport;
	row->backend = 0;
	/* Sockets are asked for seldom: most of these ports are nobody's. Where a flow has been
	 * closed, its backend may still wait for late packets (RFC 9293, 3.6.1): it takes a
	 * SYN for one of those if another client's clock is behind.
	 */
	walk_begin(&walk);
	for (int rounds = 0; rounds < 2 && !found; rounds++)
		found = (rounds ? free_port(set, key, row, &walk, now)
				: fresh_port(set, key, &walk)) &&
			!port_is_used_here(ctx, key, p->ipv4) && flow_claim(key, row, now);
	if (!found) {
		counter_bump(LB_COUNTER_PORTS_EXHAUSTED);
		return LB_SHOOT;
	}

	/* The way there is the way back reversed, at the other stage. */
	address_copy(row->addr, key->dst);
	row->sport = key->dport;
	row->dport = to->port;
	row->state = LB_FLOW_ORIGINAL;
	address_copy(key->src, p->tuple.src);
	key->sport = w->to.sport;
	address_copy(key->dst, to->addr);
	key->dport = to->port;
	key->stage = LB_STAGE_EGRESS;
	return flow_put(key, row) ? LB_TRANSLATE : LB_SHOOT;
}

/* Removes the row B that a closed flow has left, whose row D this flow has taken: it
 * would masquerade this one.
 */
static __always_inline void forget_masquerade(struct flow_key *reply)
{
	__be32 client[4];
	__be16 port = reply->dport;

	address_copy(client, reply->dst);
	address_copy(reply->dst, reply->src);
	reply->dport = reply->sport;
	address_copy(reply->src, client);
	reply->sport = port;
	flow_forget(reply);
}

/* Opens a flow for a packet that has none. LB_TRANSLATE: w->to is what to make of it.
 * `shared` is a device on which client and backend may reach each other directly.
 */
static __always_inline int flow_open(void *ctx, __u32 ifindex, bool shared, struct packet *p,
				     struct work *w, __u32 now)
{
	struct settings *set = settings_get();
	struct backend *to;
	__u32 device = 0;
	bool masquerade;
	int what;

	if (!set)
		return LB_LEAVE;
	what = opening_decide(p, ifindex, set, w, now);
	if (what != LB_TRANSLATE)
		return what;
	if ((w->fe.flags & LB_FRONTEND_DSR) && !w->fe.affinity_s) {
		what = dsr_open(p, shared, w, now);
		/* On this node: as any other, but that the client's address is kept. */
		if (what != LB_TRANSLATE)
			return what;
		if (!may_begin_flow(p))
			return LB_REJECT;
	}
	address_copy(w->client.client, p->tuple.src);
	w->client.service = w->fe.service;
	w->client.client_is_netns = 0;
	to = select_backend(&w->fe, flow_hash(p), &w->client, &w->to.backend);
	if (!to) {
		counter_bump(LB_COUNTER_DROPPED);
		return LB_SHOOT;
	}

	if (w->fe.flags & LB_FRONTEND_DSR) {
		/* Told apart again: affinity may have chosen this one. */
		if (!is_on_this_node(to)) {
			dsr_fill(w, p, to, now);
			return flow_put(&p->tuple, &w->to) ? LB_TUNNEL : LB_SHOOT;
		}
	}
	if (!open_reply(p, set, to, w, now)) {
		counter_bump(LB_COUNTER_FLOW_FAILED);
		return LB_SHOOT;
	}
	masquerade = wants_masquerade(set, &w->fe, p, to, w->pod, w->outside_row);
	if (masquerade || shared)
		device = route_device(ctx, ifindex, p->tuple.src, to->addr, p->ipv4);
	/* The backend would answer the client past us. */
	if (masquerade || (shared && device == ifindex)) {
		what = open_masquerade(ctx, p, set, to, w, device, now);
		if (what != LB_TRANSLATE)
			return what;
		w->to.state = LB_FLOW_ORIGINAL | LB_FLOW_MASQUERADED;
	} else {
		w->to.state = LB_FLOW_ORIGINAL;
		forget_masquerade(&w->flow_key);
	}
	address_copy(w->to.addr, to->addr);
	w->to.dport = to->port;
	flow_set_service(&w->to, w->fe.service);
	w->to.seen = now;
	if (to->sets & LB_SET_COUNTED)
		flow_gives_way(&p->tuple, now);
	if (!flow_put(&p->tuple, &w->to)) {
		counter_bump(LB_COUNTER_FLOW_FAILED);
		return LB_SHOOT;
	}
	load_opened(to, w->to.backend);
	return LB_TRANSLATE;
}

/* Whether a row still says where a packet is to go. Those of UDP lead to a backend that
 * serves, or to the last one known where none does (CT-2, CT-3).
 */
static __always_inline bool flow_still_holds(const struct packet *p, const struct flow *row,
					     struct work *w)
{
	struct backend *to;
	__u32 id = row->backend;

	/* A closed connection's addresses may be used again; and where the row of the answers is
	 * gone, as flows_new forgets the oldest, or is another flow's, nobody would understand
	 * them.
	 */
	if (p->tuple.proto == LB_IPPROTO_TCP)
		return !may_begin_flow(p) ||
		       (!flow_is_closed(row->state) && ((row->state & LB_FLOW_TUNNEL) ||
							flow_other(&p->tuple, row, &w->flow_key)));
	if (p->tuple.proto != LB_IPPROTO_UDP || !id)
		return true;
	to = backends.lookup(&id);
	if (to && to->service == flow_service(row) && to->port == row->dport &&
	    address_equal(to->addr, row->addr) &&
	    (to->state == LB_BACKEND_ACTIVE || to->state == LB_BACKEND_TERMINATING ||
	     to->state == LB_BACKEND_SERVING))
		return true;
	return !frontend_of_packet(p, &w->key, &w->fe) || !w->fe.slot_count;
}

#endif
