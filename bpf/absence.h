/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * What is known not to be in a table, without looking it up. Most packets that pass a node are no
 * service's: sockets have been led to their backends before any was sent. A look-up that finds
 * nothing costs more than all else that is done with such a packet, for the table is in nobody's
 * cache; a bit for many addresses is.
 */
#ifndef LB_ABSENCE_H
#define LB_ABSENCE_H

#include "maps.h"

/* lbproxy/core/absence.py does the same, and tests/packets/test_absence.py holds one against the
 * other.
 */
static __always_inline __u64 absence_mix(const __be32 addr[4], __u64 high, __u64 low)
{
	return ((__u64)addr[0] << 32 | addr[1]) * high ^ ((__u64)addr[2] << 32 | addr[3]) * low;
}

/* Of what this makes of addresses the upper bits number a bit. They are folded before the last
 * product: products alone keep equal distances equal, and addresses are given out in a row.
 * Then a node's pods may share most of their bits with services.
 */
static __always_inline __u64 absence_hash(__u64 mixed)
{
	return (mixed ^ mixed >> 32) * LB_ABSENCE_FACTOR_1;
}

static __always_inline __u32 absence_of_pair(const struct flow_key *key)
{
	__u64 mixed = absence_mix(key->src, LB_ABSENCE_FACTOR_0, LB_ABSENCE_FACTOR_1) +
		      absence_mix(key->dst, LB_ABSENCE_FACTOR_2, LB_ABSENCE_FACTOR_3);

	return absence_hash(mixed + key->stage * LB_ABSENCE_FACTOR_0) >> LB_NO_FLOWS_SHIFT;
}

/* Whether no flow at all has a row between a packet's addresses, at its stage. */
static __always_inline bool pair_has_no_flow(const struct flow_key *key)
{
	__u32 place = absence_of_pair(key), row = place >> 6;
	struct no_flows *known = no_flows.lookup(&row);

	return known && ((known->none & ~known->begun) >> (place & 63) & 1);
}

/* Must come before a row is written: a packet that is answered before would not find it. */
static __always_inline void pair_begins(const struct flow_key *key)
{
	__u32 place = absence_of_pair(key), row = place >> 6;
	struct no_flows *known = no_flows.lookup(&row);
	__u64 bit = 1ULL << (place & 63);

	if (known && !(known->begun & bit))
		__sync_fetch_and_or(&known->begun, bit);
}

/* Whether an address is no frontend's. Two bits of a row say so, either is enough, and both are
 * seldom those of services' addresses: a row costs no more than a bit. They are numbered by what
 * comes below the row's number.
 */
static __always_inline bool address_has_no_frontend(const __be32 addr[4])
{
	__u64 hash = absence_hash(absence_mix(addr, LB_ABSENCE_FACTOR_0, LB_ABSENCE_FACTOR_1));
	__u32 row = hash >> LB_NO_FRONTENDS_SHIFT;
	struct no_frontends *known = no_frontends.lookup(&row);

	return known && (known->none >> (hash >> (LB_NO_FRONTENDS_SHIFT - 6) & 63) & 1 ||
			 known->none >> (hash >> (LB_NO_FRONTENDS_SHIFT - 12) & 63) & 1);
}

/* Whether a port, in network order, is no NodePort of any protocol. */
static __always_inline bool port_is_no_node_port(__be16 port)
{
	__u32 row = LB_NO_FRONTENDS_ADDRESSES + (port >> 6);
	struct no_frontends *known = no_frontends.lookup(&row);

	return known && (known->none >> (port & 63) & 1);
}

#endif
