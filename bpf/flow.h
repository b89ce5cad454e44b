/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * The rows of flows: found, kept up to date, and moved once their client has shown
 * that it is there.
 *
 * A row that has been idle for too long is as if it were not there, whether the
 * agent has removed it yet or not. Both rows of a pair carry the same state and
 * time, so that traffic in one direction keeps the other alive too.
 */
#ifndef LB_FLOW_H
#define LB_FLOW_H

#include "absence.h"
#include "counters.h"
#include "health.h"
#include "load.h"
#include "packet.h"

#define LB_EEXIST 17
#define LB_AF_INET 2
#define LB_AF_INET6 10

/* A SYN that is repeated after so long was not answered: the second that clients wait at first,
 * less what the network may have held up the SYN before.
 */
#define LB_UNANSWERED_US 750000

/* A number that the loader puts in its place. */
#define LB_LOADED(number)                                                                          \
	({                                                                                         \
		__u64 loaded;                                                                      \
		asm volatile("%0 = %1" : "=r"(loaded) : "i"(number));                              \
		loaded;                                                                            \
	})

/* Whether flows are being moved to a larger table (lbproxy/kernel/moving.py). */
#define flows_are_moving() LB_LOADED(LB_MOVING)

/* The time in ticks. The coarse clock moves when the jiffies do, and takes as long as a tenth of
 * all that a packet needs: so it is read once a jiffy, by whichever CPU comes first. Jiffy and
 * tick are in one word, that no CPU sees half of it.
 */
static __always_inline __u32 tick_now(void)
{
	__u32 first = 0, jiffy = bpf_jiffies64(), tick;
	__u64 *last = ticks.lookup(&first), known = last ? *last : 0;

	tick = known;
	if (tick && known >> 32 == jiffy)
		return tick;
	tick = bpf_ktime_get_coarse_ns() >> LB_TICK_SHIFT;
	if (last)
		*last = (__u64)jiffy << 32 | tick;
	return tick;
}

static __always_inline struct settings *settings_get(void)
{
	__u32 first = 0;

	return settings.lookup(&first);
}

static __always_inline __u64 handover_get(__u32 row)
{
	__u64 *value = handover.lookup(&row);

	return value ? *value : 0;
}

/* Whether a flow is somebody else's, and its packets pass as they are. */
static __always_inline bool flow_is_held(__u32 state)
{
	return (state & LB_FLOW_HELD) == LB_FLOW_HELD;
}

static __always_inline __u32 flow_timeout(const struct settings *set, __u8 proto, __u32 state)
{
	__u32 ticks;

	if (proto == LB_IPPROTO_TCP) {
		if ((state & LB_FLOW_RESET) ||
		    (state & (LB_FLOW_FIN | LB_FLOW_PEER_FIN)) == (LB_FLOW_FIN | LB_FLOW_PEER_FIN))
			return set->tcp_closed_ticks;
		if (state & (LB_FLOW_FIN | LB_FLOW_PEER_FIN))
			return set->tcp_half_closed_ticks;
		return state & LB_FLOW_ASSURED ? set->tcp_established_ticks : set->tcp_new_ticks;
	}
	if (proto == LB_IPPROTO_UDP) {
		ticks = state & LB_FLOW_ASSURED ? set->udp_stream_ticks : set->udp_new_ticks;
		return flow_is_held(state) && ticks > LB_HELD_EARLIER ? ticks - LB_HELD_EARLIER
								      : ticks;
	}
	return state & LB_FLOW_ASSURED ? set->sctp_established_ticks : set->sctp_new_ticks;
}

static __always_inline bool flow_is_closed(__u32 state)
{
	return (state & LB_FLOW_RESET) ||
	       (state & (LB_FLOW_FIN | LB_FLOW_PEER_FIN)) == (LB_FLOW_FIN | LB_FLOW_PEER_FIN);
}

/* Whether flows_new has ever been needed: until then nobody looks there. */
static __always_inline bool flows_new_is_used(void)
{
	__u32 reason = LB_COUNTER_FLOWS_FULL;
	__u64 *count = counters.lookup(&reason);

	return count && *count;
}

/* Whether flows still begin in the table before, while they are being moved. */
static __always_inline bool flows_begin_before(void)
{
	return flows_are_moving() && handover_get(LB_HANDOVER_MOVING) != LB_MOVING_HERE;
}

/* The row of a key, dead or alive. One that is in neither table may just have been moved by
 * another CPU, from where it was not looked for yet to where it was not any more: a packet of
 * its flow would be answered with a RST.
 */
static __always_inline struct flow *flow_row(struct flow_key *key)
{
	struct flow *row = flows.lookup(key);

	if (row || (!flows_are_moving() && !flows_new_is_used()))
		return row;
	row = flows_new.lookup(key);
	if (!row && flows_are_moving())
		row = flows_before.lookup(key);
	return row ? row : flows.lookup(key);
}

static __always_inline bool flow_is_live(const struct flow *row, __u8 proto, __u32 now)
{
	struct settings *set;

	/* As with nearly all. */
	if (row->seen == now)
		return true;
	set = settings_get();
	/* Signed: another CPU may have seen a packet when our clock was read already. */
	return set && (__s32)(now - row->seen) <= (__s32)flow_timeout(set, proto, row->state);
}

static __always_inline struct flow *flow_find(struct flow_key *key, __u32 now)
{
	struct flow *row = flow_row(key);

	return row && flow_is_live(row, key->proto, now) ? row : NULL;
}

static __always_inline __u32 flow_service(const struct flow *row)
{
	return row->service[0] | row->service[1] << 8 | row->service[2] << 16;
}

static __always_inline void flow_set_service(struct flow *row, __u32 service)
{
	row->service[0] = service;
	row->service[1] = service >> 8;
	row->service[2] = service >> 16;
}

/* Addresses and ports of a packet. */
struct ends {
	__be32 src[4];
	__be32 dst[4];
	__be16 sport;
	__be16 dport;
};

/* What a packet becomes by its row. */
static __always_inline void flow_ends(const struct flow_key *key, const struct flow *row,
				      struct ends *to)
{
	bool enters = key->stage == LB_STAGE_INGRESS;

	address_copy(to->src, enters ? key->src : row->addr);
	address_copy(to->dst, enters ? row->addr : key->dst);
	to->sport = row->sport;
	to->dport = row->dport;
}

/* The key of the row for the other direction. */
static __always_inline void flow_partner(const struct flow_key *key, const struct flow *row,
					 struct flow_key *partner)
{
	struct ends to;

	flow_ends(key, row, &to);
	address_copy(partner->src, to.dst);
	address_copy(partner->dst, to.src);
	partner->sport = to.dport;
	partner->dport = to.sport;
	partner->proto = key->proto;
	partner->stage = !key->stage;
	partner->pad[0] = 0;
	partner->pad[1] = 0;
}

/* Whether packets that follow a partner's row are answered by those with this key. */
static __always_inline bool flow_leads_back(const struct flow *partner, const struct flow_key *key)
{
	/* The other address is in the partner's key. */
	return partner->sport == key->dport && partner->dport == key->sport &&
	       address_equal(partner->addr, key->stage == LB_STAGE_INGRESS ? key->dst : key->src);
}

static __always_inline void unassured_add(__s64 rows)
{
	__u32 first = 0;
	__u64 *count = unassured.lookup(&first);

	if (count)
		__sync_fetch_and_add(count, rows);
}

static __always_inline bool flows_are_flooded(void)
{
	__u32 first = 0;
	__u64 *count = unassured.lookup(&first);

	return count && (__s64)*count >= (__s64)LB_LOADED(LB_MOST_UNASSURED);
}

/* Puts a row where there is none. Nearly always there is none and there is room, so it is tried
 * before anything is asked; 0, or why not.
 */
static __always_inline long flow_insert(struct flow_key *key, struct flow *row)
{
	long failed = flows_begin_before() ? flows_before.insert(key, row) : flows.insert(key, row);

	if (!failed)
		unassured_add(1);
	return failed;
}

/* Keeps a row whose pair was said to begin; false where there is no room even in flows_new or, if
 * it is to be a fresh one, where the key has a row already.
 */
static __always_inline bool flow_keep(struct flow_key *key, struct flow *row, bool fresh)
{
	bool flooded = flows_are_flooded(), before = flows_begin_before(), counted;
	long failed = flooded ? -1 : flow_insert(key, row);
	struct flow *had;

	if (failed == -LB_EEXIST && fresh)
		return false;
	if (failed && !fresh) {
		/* Where there is a row in flows already, one in flows_new would not be seen. */
		had = flows_are_moving() ? flows_before.lookup(key) : NULL;
		if (!had)
			had = flows.lookup(key);
		if (had) {
			counted = !(had->state & LB_FLOW_ASSURED);
			failed = before ? flows_before.update(key, row) : flows.update(key, row);
			if (!failed && !counted)
				unassured_add(1);
		}
	}
	/* A key has one row: it must not come to light when this one goes. */
	if (!failed && !fresh && flows_new_is_used())
		flows_new.delete(key);
	if (!failed)
		return true;
	counter_bump(LB_COUNTER_FLOWS_FULL);
	return !(fresh ? flows_new.insert(key, row) : flows_new.update(key, row));
}

/* Keeps a row, whether its key has one or not; false where there is no room even in flows_new. */
static __always_inline bool flow_put(struct flow_key *key, struct flow *row)
{
	pair_begins(key);
	return flow_keep(key, row, false);
}

/* Removes a row, if there is one. */
static __always_inline void flow_forget(struct flow_key *key)
{
	struct flow *row;

	/* First: whoever has moved it meanwhile looks there once more. */
	if (flows_are_moving())
		flows_before.delete(key);
	row = flows.lookup(key);
	if (row && !(row->state & LB_FLOW_ASSURED))
		unassured_add(-1);
	if (row)
		flows.delete(key);
	else if (flows_new_is_used())
		flows_new.delete(key);
}

/* Leaves the flow that a packet begins to whoever begins it. Both rows lead to themselves: what
 * comes in, and the answers as they leave again with the kernel's translation undone. key and
 * row are room to work in.
 */
static __always_inline void flow_hold(const struct flow_key *tuple, __u32 service,
				      struct flow_key *key, struct flow *row, __u32 now)
{
	address_copy(key->src, tuple->dst);
	address_copy(key->dst, tuple->src);
	key->sport = tuple->dport;
	key->dport = tuple->sport;
	key->proto = tuple->proto;
	key->stage = LB_STAGE_EGRESS;
	key->pad[0] = 0;
	key->pad[1] = 0;
	address_copy(row->addr, tuple->dst);
	row->sport = tuple->dport;
	row->dport = tuple->sport;
	row->backend = 0;
	flow_set_service(row, service);
	row->seen = now;
	row->state = LB_FLOW_HELD;
	flow_put(key, row);
	*key = *tuple;
	row->sport = tuple->sport;
	row->dport = tuple->dport;
	row->state = LB_FLOW_HELD | LB_FLOW_ORIGINAL;
	flow_put(key, row);
}

/* Whether two rows of the same key lead to the same. */
static __always_inline bool flow_leads_to(const struct flow *row, const struct flow *to)
{
	return row->sport == to->sport && row->dport == to->dport &&
	       address_equal(row->addr, to->addr);
}

/* Whether a row may be kept that is another flow's now, if `has` is not NULL: that flow
 * is over, or is this one.
 */
static __always_inline bool flow_may_take(const struct flow_key *key, const struct flow *has,
					  const struct flow *row, __u32 now)
{
	return !has || !flow_is_live(has, key->proto, now) || flow_is_closed(has->state) ||
	       flow_leads_to(has, row);
}

/* Keeps a row unless its key is another flow's. */
static __always_inline bool flow_claim(struct flow_key *key, struct flow *row, __u32 now)
{
	struct flow *has;

	pair_begins(key);
	if (!flows_are_moving() && !flows_new_is_used() && !flows_are_flooded() &&
	    !flow_insert(key, row))
		return true;
	has = flow_row(key);
	return flow_may_take(key, has, row, now) && flow_keep(key, row, !has);
}

/* Moves a row whose client has answered out of flows_new, which would forget it in the
 * end. While flows is full it stays there, and is tried again with every tick.
 */
static __always_inline void flow_settle(struct flow_key *key, struct flow *row, bool first)
{
	struct flow settled;

	if (first && flows.lookup(key)) {
		unassured_add(-1);
		return;
	}
	/* It is moved by the agent, or stays where it is for now. */
	if (flows_are_moving() && (flows_begin_before() || flows_before.lookup(key)))
		return;
	/* It has been where it belongs, or is no more. */
	if (!first && (!flows_new_is_used() || flows_new.lookup(key) != row))
		return;
	settled = *row;
	pair_begins(key);
	/* Another CPU may have moved it meanwhile. */
	if (!flows.insert(key, &settled))
		flows_new.delete(key);
}

/* Whether a row is the one that its flow is counted by, if its backend is counted. */
static __always_inline bool flow_is_counted(const struct flow_key *key, const struct flow *row)
{
	return row->backend && key->stage == LB_STAGE_INGRESS &&
	       (row->state & (LB_FLOW_ORIGINAL | LB_FLOW_TUNNEL)) == LB_FLOW_ORIGINAL;
}

/* Takes note that another flow is to have this key: what had it and is still counted, as its
 * answers were forgotten or its backend serves no longer, is over. One that has expired
 * is the agent's to count, or has been taken for closed already.
 */
static __always_inline void flow_gives_way(struct flow_key *key, __u32 now)
{
	struct flow *row = flow_find(key, now);

	if (row && !flow_is_closed(row->state) && flow_is_counted(key, row))
		load_closed(row->backend, row->addr, row->dport);
}

/* The time of a SYN, as rows of answers keep it. */
static __always_inline __u32 syn_now(void)
{
	return (bpf_ktime_get_ns() >> LB_SYN_SHIFT) & ~LB_SYN_UNANSWERED;
}

/* How long ago that was, in us. */
static __always_inline __u32 syn_age(__u32 syn)
{
	__u64 age = (__u32)(syn_now() - (syn & ~LB_SYN_UNANSWERED));

	return (age << LB_SYN_SHIFT) / 1000;
}

/* The row of this key, if it is the other one of a pair. */
static __always_inline struct flow *flow_back(const struct flow_key *key,
					      struct flow_key *other_key)
{
	struct flow *other = flow_row(other_key);

	return other && flow_leads_back(other, key) ? other : NULL;
}

/* Finds the other row of a pair; NULL where it is another flow's by now. */
static __always_inline struct flow *flow_other(const struct flow_key *key, const struct flow *row,
					       struct flow_key *other_key)
{
	flow_partner(key, row, other_key);
	return flow_back(key, other_key);
}

/* A client has repeated its SYN: nobody has answered the one before. That time runs from the last
 * one is kept in the row of the answers. Returns whether it counts.
 */
static __always_inline bool syn_again(struct flow *reply)
{
	__u32 syn = reply->backend;

	/* Else the network has doubled it, or another connection was tried from its port. */
	if (!syn || syn_age(syn) < LB_UNANSWERED_US)
		return false;
	reply->backend = syn_now() | LB_SYN_UNANSWERED;
	return !(syn & LB_SYN_UNANSWERED);
}

/* What a packet of a client tells of how its connection fares. */
static __always_inline void flow_asked(const struct flow_key *key, const struct flow *row,
				       __u32 was, __u8 tcp_flags, struct flow *reply)
{
	struct backend_health *to;

	if ((was & (LB_FLOW_REPLIED | LB_FLOW_RESET)) || !flow_is_counted(key, row) ||
	    (tcp_flags & (LB_TCP_SYN | LB_TCP_ACK)) != LB_TCP_SYN || !syn_again(reply))
		return;
	to = health_of(row->backend, row->addr, row->dport, LB_HEALTH_ELSEWHERE);
	if (to)
		__sync_fetch_and_add(&to->unanswered, 1);
}

/* What a backend's answer does: `syn` and `was` are time and state of its row before, `asked` is
 * the row of what the client sends.
 */
static __always_inline void flow_answered(__u32 syn, __u32 was, __u8 tcp_flags,
					  const struct flow_key *asked_key,
					  const struct flow *asked)
{
	__u32 flags = tcp_flags & (LB_TCP_SYN | LB_TCP_ACK | LB_TCP_RST);
	bool first = !(was & LB_FLOW_REPLIED);
	struct backend_health *to;

	if (!flags || !syn || (was & (LB_FLOW_ORIGINAL | LB_FLOW_RESET)) ||
	    !flow_is_counted(asked_key, asked))
		return;
	/* Whoever is reset after a goodbye, or before the client has answered, has seen to it. */
	if (!first && (!(flags & LB_TCP_RST) || (was & (LB_FLOW_ASSURED | LB_FLOW_FIN |
							LB_FLOW_PEER_FIN)) != LB_FLOW_ASSURED))
		return;
	to = health_of(asked->backend, asked->addr, asked->dport, LB_HEALTH_ELSEWHERE);
	if (!to)
		return;
	if (!first)
		__sync_fetch_and_add(&to->resets, 1);
	else if (flags & LB_TCP_RST)
		__sync_fetch_and_add(&to->refused, 1);
	else if (flags == (LB_TCP_SYN | LB_TCP_ACK))
		health_established(to, syn_age(syn));
}

/* A host says that nobody listens there, in answer to a client's SYN; `row` is the one of such
 * answers. The time of the SYN goes, so that a connection counts once.
 */
static __always_inline void flow_unreachable(const struct flow_key *key, struct flow *row)
{
	struct backend_health *to;
	struct flow_key asked_key;
	struct flow *asked;

	if (key->proto != LB_IPPROTO_TCP || !row->backend ||
	    (row->state & (LB_FLOW_ORIGINAL | LB_FLOW_REPLIED)))
		return;
	asked = flow_other(key, row, &asked_key);
	if (!asked || !flow_is_counted(&asked_key, asked))
		return;
	row->backend = 0;
	to = health_of(asked->backend, asked->addr, asked->dport, LB_HEALTH_ELSEWHERE);
	if (to)
		__sync_fetch_and_add(&to->refused, 1);
}

/* What is told of a backend's health: each program only sees one of these, so that the verifier
 * need not follow both.
 */
#define LB_COUNT_NOTHING 0
#define LB_COUNT_ASKED 1
#define LB_COUNT_ANSWERS 2

/* Takes note of a packet of a flow, in both rows of the pair. */
static __always_inline void flow_track(struct flow_key *key, struct flow *row, __u8 tcp_flags,
				       __u32 now, int counts)
{
	__u32 state = row->state, was = state, mirrored, syn;
	struct flow_key partner_key;
	struct flow *partner;
	bool assured = false, closes;

	if (!(state & LB_FLOW_ORIGINAL)) {
		state |= LB_FLOW_REPLIED;
	} else if ((state & (LB_FLOW_REPLIED | LB_FLOW_ASSURED)) == LB_FLOW_REPLIED &&
		   (key->proto == LB_IPPROTO_TCP
			    ? (tcp_flags & (LB_TCP_SYN | LB_TCP_ACK)) == LB_TCP_ACK
			    /* To the tracker a flow has to be two seconds old for that. */
			    : !flow_is_held(state))) {
		state |= LB_FLOW_ASSURED;
		assured = true;
	}
	if (key->proto == LB_IPPROTO_TCP) {
		if (tcp_flags & LB_TCP_FIN)
			state |= LB_FLOW_FIN;
		if (tcp_flags & LB_TCP_RST)
			state |= LB_FLOW_RESET;
	}
	/* One branch, with which nearly all packets end. */
	if (!((state ^ was) | (row->seen ^ now) |
	      (counts == LB_COUNT_ASKED ? tcp_flags & LB_TCP_SYN : 0)))
		return;

	row->seen = now;
	/* A SYN that changes nothing keeps the rows alive, and leaves their states to the answer
	 * that another CPU may be seeing.
	 */
	if (counts == LB_COUNT_ASKED && state == was && (tcp_flags & LB_TCP_SYN)) {
		partner = flow_other(key, row, &partner_key);
		if (!partner)
			return;
		partner->seen = now;
		flow_asked(key, row, was, tcp_flags, partner);
		return;
	}
	row->state = state;
	closes = flow_is_closed(state) && !flow_is_closed(was);
	if (closes && flow_is_counted(key, row))
		load_closed(row->backend, row->addr, row->dport);
	/* Once a row has moved, somebody else may be given the memory where it was. */
	syn = row->backend;
	flow_partner(key, row, &partner_key);
	if (state & LB_FLOW_ASSURED)
		flow_settle(key, row, assured);
	partner = flow_back(key, &partner_key);
	if (!partner)
		return;
	partner->seen = now;
	mirrored = state & (LB_FLOW_REPLIED | LB_FLOW_ASSURED | LB_FLOW_RESET);
	if (state & LB_FLOW_FIN)
		mirrored |= LB_FLOW_PEER_FIN;
	if (state & LB_FLOW_PEER_FIN)
		mirrored |= LB_FLOW_FIN;
	partner->state =
		(partner->state & (LB_FLOW_ORIGINAL | LB_FLOW_TUNNEL | LB_FLOW_MASQUERADED)) |
		mirrored;
	if (closes && flow_is_counted(&partner_key, partner))
		load_closed(partner->backend, partner->addr, partner->dport);
	if (counts == LB_COUNT_ANSWERS && ((state & ~was) & (LB_FLOW_REPLIED | LB_FLOW_RESET)))
		flow_answered(syn, was, tcp_flags, &partner_key, partner);
	if (state & LB_FLOW_ASSURED)
		flow_settle(&partner_key, partner, assured);
}

#endif
