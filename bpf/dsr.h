/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Direct server return: a packet for a backend of another node goes there as it is,
 * inside another packet, and that node answers the client itself.
 *
 * A Maglev table is a function of the packet, so this node need not remember where a
 * flow goes: only while the table that came before would say something else is a row
 * kept. A connection without one began before the change, unless it begins now.
 */
#ifndef LB_DSR_H
#define LB_DSR_H

#include "flow.h"
#include "select.h"

static __always_inline bool is_on_this_node(const struct backend *to)
{
	return (to->sets & LB_SET_HERE) || node_address_find(to->addr);
}

/* What a row of a flow that is tunnelled says. */
static __always_inline void dsr_fill(struct work *w, const struct packet *p,
				     const struct backend *to, __u32 now)
{
	address_copy(w->to.addr, to->addr);
	w->to.sport = p->tuple.sport;
	w->to.dport = to->port;
	flow_set_service(&w->to, w->fe.service);
	w->to.seen = now;
	w->to.state = LB_FLOW_ORIGINAL | LB_FLOW_REPLIED | LB_FLOW_TUNNEL;
}

/* The backend that a flow went to before its frontend's last change; NULL where that is
 * the same one, or is gone.
 */
static __always_inline struct backend *dsr_earlier(struct work *w, __u32 hash, __u32 *id)
{
	struct earlier_key key = {.service = w->fe.service, .set = w->fe.sets};
	struct earlier *table = earlier_slots.lookup(&key);
	struct backend *to;
	__u32 before;

	if (!table)
		return NULL;
	before = slot_of_table(table->block, table->slot_count, hash);
	if (before == *id)
		return NULL;
	to = backend_serving(&w->fe, before);
	if (to)
		*id = before;
	return to;
}

/* Where a flow of a DSR frontend goes. LB_TUNNEL: to the backend that w->to names;
 * LB_TRANSLATE: to one of this node.
 */
static __always_inline int dsr_open(struct packet *p, bool shared, struct work *w, __u32 now)
{
	__u32 hash = hash_mix(flow_hash(p)), id = slot_at(&w->fe, hash), current = id;
	struct backend *before = dsr_earlier(w, hash, &id), *to = before;
	bool begins = p->tuple.proto == LB_IPPROTO_TCP && may_begin_flow(p);

	if (begins || !before) {
		id = current;
		to = backends.lookup(&id);
		if (!to || to->service != w->fe.service) {
			counter_bump(LB_COUNTER_BAD_SLOT);
			return LB_SHOOT;
		}
	}
	if (is_on_this_node(to))
		return LB_TRANSLATE;
	if (begins)
		count_connection(w->fe.service, id);
	w->to.backend = id;
	dsr_fill(w, p, to, now);
	/* Of what pods send, only beginnings are looked at without a row. */
	if ((before || shared) && !flow_put(&p->tuple, &w->to)) {
		counter_bump(LB_COUNTER_FLOW_FAILED);
		return LB_SHOOT;
	}
	return LB_TUNNEL;
}

#endif
