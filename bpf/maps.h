/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * The maps, one LB_MAP line each: type, key, value, name, rows, flags. The agent
 * reads these lines (lbproxy/abi.py), creates and pins the maps itself, and the
 * loader checks that a pinned one still fits before a program may open it:
 * BCC takes a pinned map of another shape without a word.
 *
 * LB_ROWS_* and LB_PIN_* come from the agent: sizes of its configuration, and
 * where it has pinned the maps.
 */
#ifndef LB_MAPS_H
#define LB_MAPS_H

#include "abi.h"

#define LB_MOST_CPUS 1024
#define LB_NO_PREALLOC 0x1
#define LB_NO_COMMON_LRU 0x2
#define LB_MMAPABLE 0x400 /* so that the agent can read all rows at once */

#ifndef LB_DECLARE /* trace.c has its own */
#define LB_DECLARE(type, key, value, name, rows, flags)                                            \
	BPF_TABLE_PINNED7(type, key, value, name, rows, LB_PIN_##name, flags)
#endif
#define LB_MAP(type, key, value, name, rows, flags) LB_DECLARE(type, key, value, name, rows, flags)

LB_MAP("hash", struct frontend_key, struct frontend, frontends, LB_ROWS_FRONTENDS, LB_NO_PREALLOC);
LB_MAP("array", __u32, struct slot_block, slots, LB_ROWS_SLOTS, LB_MMAPABLE);
LB_MAP("array", __u32, struct backend, backends, LB_ROWS_BACKENDS, LB_MMAPABLE);
LB_MAP("array", __u32, struct backend_stats, backend_stats, LB_ROWS_BACKENDS, LB_MMAPABLE);
LB_MAP("array", __u32, struct backend_load, backend_load, LB_ROWS_BACKENDS, LB_MMAPABLE);
LB_MAP("array", __u32, __u32, load_corrections, LB_ROWS_BACKENDS, LB_MMAPABLE);
LB_MAP("hash", __u32, struct backend_health, backend_health, LB_ROWS_BACKEND_HEALTH,
       LB_NO_PREALLOC);
LB_MAP("array", __u32, struct service_stats, service_stats, LB_ROWS_SERVICES, LB_MMAPABLE);
LB_MAP("hash", __u32, struct service_meta, services, LB_ROWS_SERVICES, LB_NO_PREALLOC);
LB_MAP("hash", __u32, struct locality, localities, LB_ROWS_LOCALITIES, LB_NO_PREALLOC);
LB_MAP("hash", struct node_address_key, struct node_address, node_addresses, LB_ROWS_NODE_ADDRESSES,
       LB_NO_PREALLOC);
LB_MAP("array", __u32, struct settings, settings, 1, LB_MMAPABLE);
LB_MAP("array", __u32, __u64, counters, LB_COUNTERS, LB_MMAPABLE);
LB_MAP("array", __u32, struct socket_record, sockets, LB_ROWS_SOCKETS, LB_MMAPABLE);
LB_MAP("lru_hash", struct socket_spill_key, struct socket_record, socket_spill,
       LB_ROWS_SOCKET_SPILL, 0);
LB_MAP("lru_hash", struct affinity_key, struct affinity, affinity, LB_ROWS_AFFINITY, 0);

/* The packet path. Flows live in `flows`, whose rows the agent removes when they
 * have been idle; while it is full of unanswered ones, new flows go to `flows_new`,
 * which forgets the oldest by itself, and move when their client has answered. Each CPU
 * forgets its own: one list for all, when it is contended, gives way with the rows that came
 * last, which are of handshakes under way.
 */
LB_MAP("hash", struct flow_key, struct flow, flows, LB_ROWS_FLOWS, LB_NO_PREALLOC);
LB_MAP("lru_hash", struct flow_key, struct flow, flows_new, LB_ROWS_FLOWS_NEW, LB_NO_COMMON_LRU);
LB_MAP("array", __u32, struct no_flows, no_flows, LB_NO_FLOWS_ROWS, LB_MMAPABLE);
LB_MAP("array", __u32, struct no_frontends, no_frontends, LB_NO_FRONTENDS_ROWS, LB_MMAPABLE);
LB_MAP("lru_hash", struct fragment_key, struct fragment, fragments, LB_ROWS_FRAGMENTS, 0);
LB_MAP("hash", __u32, struct device, devices, LB_ROWS_DEVICES, LB_NO_PREALLOC);
LB_MAP("lpm_trie", struct source_range_key, struct source_range, source_ranges,
       LB_ROWS_SOURCE_RANGES, LB_NO_PREALLOC);
LB_MAP("hash", struct netns_key, struct netns_address, netns_addresses, LB_ROWS_NETNS_ADDRESSES,
       LB_NO_PREALLOC);
LB_MAP("hash", struct tunnel_end_key, struct tunnel_end, tunnel_ends, LB_ROWS_TUNNEL_ENDS,
       LB_NO_PREALLOC);
LB_MAP("hash", struct earlier_key, struct earlier, earlier_slots, LB_ROWS_EARLIER_SLOTS,
       LB_NO_PREALLOC);
/* How many rows of `flows` belong to flows that are not assured: counted up by the
 * programs, counted anew by the agent.
 */
LB_MAP("array", __u32, __u64, unassured, 1, LB_MMAPABLE);
/* The tick that flow.h has read last, and when. */
LB_MAP("array", __u32, __u64, ticks, 1, LB_MMAPABLE);
/* Who begins flows while another proxy's are taken over, or given back. */
LB_MAP("array", __u32, __u64, handover, LB_HANDOVER_ROWS, LB_MMAPABLE);
/* A row for each CPU, by number. Not a map of BPF's own per-CPU kind, whose rows are
 * several at once to everyone else.
 */
LB_MAP("array", __u32, struct scratch, scratch, LB_MOST_CPUS, LB_MMAPABLE);

/* Programs that others go on with; the loader fills it, anew for each generation. */
#define LB_TAIL_OPEN 0
#define LB_TAIL_TUNNEL 1
#define LB_TAIL_ANSWER 2
#define LB_TAIL_ICMP_ERROR 3
#define LB_TAIL_UNTUNNEL 4
#define LB_TAIL_UNTUNNELLED 5
LB_DECLARE("prog", __u32, __u32, tails, 6, 0);

/* The smaller table that `flows` takes the place of, while flows are moved; else `flows` itself. */
LB_DECLARE("hash", struct flow_key, struct flow, flows_before, 1, LB_NO_PREALLOC);

#endif
