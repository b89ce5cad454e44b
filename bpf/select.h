/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Which backend a new flow goes to: the one the client is remembered on, else a
 * slot of the frontend's table.
 */
#ifndef LB_SELECT_H
#define LB_SELECT_H

#include "counters.h"
#include "load.h"
#include "maps.h"

#define LB_NS_PER_S 1000000000ULL

/* The backend of this id if the frontend may choose it, else NULL.
 *
 * Ids are used again after a backend is gone, so a remembered one is checked
 * against the service that remembers it.
 */
static __always_inline struct backend *backend_usable(const struct frontend *fe, __u32 id)
{
	struct backend *found = backends.lookup(&id);

	if (found && found->service == fe->service && (found->sets & fe->sets))
		return found;
	return NULL;
}

/* The backend of this id if it still serves flows that it has, else NULL: a change
 * of policy or its termination does not move them, as conntrack would not.
 */
static __always_inline struct backend *backend_serving(const struct frontend *fe, __u32 id)
{
	struct backend *found = backends.lookup(&id);

	if (found && found->service == fe->service &&
	    (found->state == LB_BACKEND_ACTIVE || found->state == LB_BACKEND_TERMINATING ||
	     found->state == LB_BACKEND_SERVING))
		return found;
	return NULL;
}

/* The murmur3 finalizer: every bit of the input moves every bit of the result. */
static __always_inline __u32 hash_mix(__u64 value)
{
	value ^= value >> 33;
	value *= 0xff51afd7ed558ccdULL;
	value ^= value >> 33;
	value *= 0xc4ceb9fe1a85ec53ULL;
	value ^= value >> 33;
	return (__u32)value;
}

static __always_inline __u32 slot_value(__u32 first_block, __u32 slot)
{
	__u32 row = first_block + slot / LB_SLOTS_PER_BLOCK;
	struct slot_block *block = slots.lookup(&row);

	return block ? block->backend[slot % LB_SLOTS_PER_BLOCK] : 0;
}

/* The backend in the slot that hash falls on: hash scaled to the table, so that
 * neither a division nor a power-of-two size is needed.
 */
static __always_inline __u32 slot_of_table(__u32 first_block, __u32 slot_count, __u32 hash)
{
	return slot_value(first_block, ((__u64)hash * slot_count) >> 32);
}

static __always_inline __u32 slot_at(const struct frontend *fe, __u32 hash)
{
	return slot_of_table(fe->block, fe->slot_count, hash);
}

/* Of two slots drawn at random the backend that has less open for its weight, the first one
 * where they are even: so where nothing is open the slots alone decide.
 */
static __always_inline __u32 slot_of_two(const struct frontend *fe)
{
	__u32 count = fe->slot_count, at = ((__u64)bpf_get_prandom_u32() * count) >> 32;
	__u32 one = slot_value(fe->block, at), other;

	if (count < 2)
		return one;
	/* Any slot but the first. */
	at += 1 + (((__u64)bpf_get_prandom_u32() * (count - 1)) >> 32);
	other = slot_value(fe->block, at < count ? at : at - count);
	return other != one && load_is_less(other, one) ? other : one;
}

/* Chooses a backend for a new flow and counts it; *id receives its id. NULL
 * where there is none. flow identifies the flow to a Maglev table; client
 * identifies the client to session affinity.
 */
static __always_inline struct backend *select_backend(const struct frontend *fe, __u64 flow,
						      const struct affinity_key *client, __u32 *id)
{
	struct affinity *remembered = NULL;
	struct backend *chosen = NULL;
	__u32 now_s = 0;

	if (fe->affinity_s) {
		remembered = affinity.lookup((struct affinity_key *)client);
		now_s = bpf_ktime_get_coarse_ns() / LB_NS_PER_S;
		/* Signed: another CPU may have started it anew a moment after our clock was read.
		 */
		if (remembered && (__s32)(now_s - remembered->started_s) < (__s32)fe->affinity_s) {
			*id = remembered->backend;
			chosen = backend_usable(fe, *id);
		}
	}

	if (!chosen) {
		if (fe->flags & LB_FRONTEND_LEAST_CONN)
			*id = slot_of_two(fe);
		else if (fe->flags & LB_FRONTEND_MAGLEV)
			*id = slot_at(fe, hash_mix(flow));
		else
			*id = slot_at(fe, bpf_get_prandom_u32());
		chosen = backends.lookup(id);
		if (!chosen || chosen->service != fe->service) {
			counter_bump(LB_COUNTER_BAD_SLOT);
			return NULL;
		}
	}

	if (fe->affinity_s) {
		struct affinity fresh = {.backend = *id, .started_s = now_s};

		if (affinity.update((struct affinity_key *)client, &fresh))
			counter_bump(LB_COUNTER_AFFINITY_FAILED);
	}
	count_connection(fe->service, *id);
	return chosen;
}

#endif
