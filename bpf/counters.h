/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Counters, shared by all CPUs: they move once a connection, not once a packet,
 * and a row for each CPU would cost 64 times the memory on a 64-core node.
 */
#ifndef LB_COUNTERS_H
#define LB_COUNTERS_H

#include "maps.h"

static __always_inline void counter_bump(__u32 reason)
{
	__u64 *count = counters.lookup(&reason);

	if (count)
		__sync_fetch_and_add(count, 1);
}

static __always_inline void count_connection(__u32 service, __u32 backend)
{
	struct service_stats *of_service = service_stats.lookup(&service);
	struct backend_stats *of_backend = backend_stats.lookup(&backend);

	if (of_service)
		__sync_fetch_and_add(&of_service->connections, 1);
	if (of_backend)
		__sync_fetch_and_add(&of_backend->connections, 1);
}

static __always_inline void count_refusal(__u32 service)
{
	struct service_stats *of_service = service_stats.lookup(&service);

	if (of_service)
		__sync_fetch_and_add(&of_service->refused, 1);
	counter_bump(LB_COUNTER_REFUSED);
}

#endif
