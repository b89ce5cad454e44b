/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * How many connections and flows each backend has open, for the services that choose by it:
 * only backends with LB_SET_COUNTED are counted, and nobody else's are even asked for.
 *
 * Programs count what they see begin and end. Flows that expire they do not see, nor sockets
 * of the time before a service was counted: so the agent counts the records and rows that are
 * there, now and then, and keeps what its count differs by as a correction.
 */
#ifndef LB_LOAD_H
#define LB_LOAD_H

#include "address.h"
#include "maps.h"

static __always_inline void load_opened(const struct backend *to, __u32 id)
{
	struct backend_load *load;

	if (!(to->sets & LB_SET_COUNTED))
		return;
	load = backend_load.lookup(&id);
	if (load)
		__sync_fetch_and_add(&load->opened, 1);
}

/* The backend of an id, NULL where that is another one's by now. */
static __always_inline struct backend *backend_at(__u32 id, const __be32 addr[4], __be16 port)
{
	struct backend *found = backends.lookup(&id);

	return found && found->port == port && address_equal(found->addr, addr) ? found : NULL;
}

/* What was open to a backend is closed. */
static __always_inline void load_closed(__u32 id, const __be32 addr[4], __be16 port)
{
	struct backend *to = backend_at(id, addr, port);
	struct backend_load *load;

	if (!to || !(to->sets & LB_SET_COUNTED))
		return;
	load = backend_load.lookup(&id);
	if (load)
		__sync_fetch_and_add(&load->closed, 1);
}

/* How much a backend has open, never less than nothing. */
static __always_inline __u32 load_open(__u32 id)
{
	struct backend_load *load = backend_load.lookup(&id);
	__u32 *correction = load_corrections.lookup(&id);
	__s32 open;

	if (!load || !correction)
		return 0;
	open = load->opened - load->closed + *correction;
	return open < 0 ? 0 : open;
}

/* Whether the backend of `other` has less open than that of `one`, for its weight. */
static __always_inline bool load_is_less(__u32 other, __u32 one)
{
	struct backend *a = backends.lookup(&other), *b = backends.lookup(&one);

	if (!a || !b)
		return false;
	return (__u64)load_open(other) * b->weight < (__u64)load_open(one) * a->weight;
}

#endif
