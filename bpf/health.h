/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Where it is counted how connections to a backend fare: those of sockets by sock_health.c,
 * those that packets begin by flow.h. A connection is one or the other, as what a socket sends
 * to a backend itself has no row in `flows`. Each kind has rows of its own: where a firewall
 * keeps clients of elsewhere from a backend, that need not speak against it.
 */
#ifndef LB_HEALTH_H
#define LB_HEALTH_H

#include "counters.h"
#include "load.h"

/* Where to count what becomes of a connection to a backend; NULL where it has gone meanwhile
 * and its id is another's. `clients` says whose it is: 0, or LB_HEALTH_ELSEWHERE, which the id
 * may have already.
 */
static __always_inline struct backend_health *health_of(__u32 id, const __be32 addr[4], __be16 port,
							__u32 clients)
{
	struct backend_health none = {}, *found;

	if (!backend_at(id & ~LB_HEALTH_ELSEWHERE, addr, port))
		return NULL;
	id |= clients;
	found = backend_health.lookup(&id);
	if (found)
		return found;
	/* Of several CPUs one makes the row, and none sets back what another has counted. */
	backend_health.insert(&id, &none);
	found = backend_health.lookup(&id);
	if (!found)
		counter_bump(LB_COUNTER_HEALTH_FAILED);
	return found;
}

static __always_inline void health_rtt(struct backend_health *to, __u32 us)
{
	__u32 known = to->srtt_us;

	/* Another CPU's sample may get lost between; over many it does not matter. */
	to->srtt_us = known ? known - known / 8 + us / 8 : us;
}

/* A handshake was answered, so long after its SYN. */
static __always_inline void health_established(struct backend_health *to, __u32 us)
{
	__sync_fetch_and_add(&to->established, 1);
	__sync_fetch_and_add(&to->handshake_us, us);
	health_rtt(to, us);
}

#endif
