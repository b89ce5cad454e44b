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

/* Of what these make of addresses the upper 17 bits number a bit. lbproxy/core/absence.py does the
 * same, and tests/packets/test_absence.py holds one against the other.
 */
static __always_inline __u64 absence_mix(const __be32 addr[4], __u64 high, __u64 low)
{
	return ((__u64)addr[0] << 32 | addr[1]) * high ^ ((__u64)addr[2] << 32 | addr[3]) * low;
}

static __always_inline __u32 absence_of_pair(const struct flow_key *key)
{
	__u64 hash = absence_mix(key->src, LB_ABSENCE_FACTOR_0, LB_ABSENCE_FACTOR_1) +
		     absence_mix(key->dst, LB_ABSENCE_FACTOR_2, LB_ABSENCE_FACTOR_3);

	hash += key->stage * LB_ABSENCE_FACTOR_0;
	return hash * LB_ABSENCE_FACTOR_1 >> LB_ABSENCE_SHIFT;
}

static __always_inline __u32 absence_of_address(const __be32 addr[4])
{
	__u64 hash = absence_mix(addr, LB_ABSENCE_FACTOR_0, LB_ABSENCE_FACTOR_1);

	return hash * LB_ABSENCE_FACTOR_1 >> LB_ABSENCE_SHIFT;
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

static __always_inline bool absence_bit(__u32 place, __u32 first)
{
	__u32 row = first + (place >> 6);
	struct no_frontends *known = no_frontends.lookup(&row);

	return known && (known->none >> (place & 63) & 1);
}

/* Whether an address is no frontend's. */
static __always_inline bool address_has_no_frontend(const __be32 addr[4])
{
	return absence_bit(absence_of_address(addr), 0);
}

/* Whether a port, in network order, is no NodePort of any protocol. */
static __always_inline bool port_is_no_node_port(__be16 port)
{
	return absence_bit(port, LB_NO_FRONTENDS_ADDRESSES);
}

#endif
