/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Which frontend, if any, an address, port and protocol belong to.
 */
#ifndef LB_FRONTEND_H
#define LB_FRONTEND_H

#include "address.h"
#include "counters.h"
#include "maps.h"

/* Whether NodePorts are served on this address when dialled from here.
 *
 * A loopback address means this node only in the node's own network namespace:
 * in a pod it is the pod itself.
 */
static __always_inline bool serves_node_ports(struct bpf_sock_addr *ctx, const __be32 addr[4])
{
	struct node_address_key key;
	struct node_address *found;

	if (address_is_loopback_v4(addr)) {
		__u32 first = 0;
		struct settings *set = settings.lookup(&first);

		return set && (set->flags & LB_SETTING_LOCALHOST_NODE_PORTS) &&
		       bpf_get_netns_cookie(ctx) == set->host_netns;
	}
	address_copy(key.addr, addr);
	found = node_addresses.lookup(&key);
	return found && (found->flags & LB_NODE_ADDRESS_NODE_PORTS);
}

static __always_inline bool frontend_equal(const struct frontend *a, const struct frontend *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;

	_Static_assert(sizeof(*a) == 3 * sizeof(*x), "frontend_equal compares three words");
	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2];
}

/* Copies the row of a key; false where there is none.
 *
 * A hash map replaces a row atomically for whoever looks it up, but hands the old
 * row's memory to the next one that is written, at once and to any key: a program
 * that still reads the old row may see another service, or half of one. So a copy
 * counts only if a second look finds the same.
 */
static __always_inline bool frontend_read(struct frontend_key *key, struct frontend *fe)
{
	struct frontend *row = frontends.lookup(key);
	struct frontend again;

	if (!row)
		return false;
	*fe = *row;
#pragma clang loop unroll(disable)
	for (int tries = 0; tries < 4; tries++) {
		row = frontends.lookup(key);
		if (!row)
			return false;
		again = *row;
		if (frontend_equal(fe, &again))
			return true;
		*fe = again;
	}
	counter_bump(LB_COUNTER_UNSTEADY);
	return true;
}

/* Copies the frontend that key names to fe; false where it names none.
 *
 * A NodePort is stored once, under its family's zero address: the node's own
 * addresses come and go, and the row must not have to follow them. An exact row
 * wins.
 */
static __always_inline bool frontend_lookup(struct bpf_sock_addr *ctx, struct frontend_key *key,
					    struct frontend *fe)
{
	struct frontend_key any = {};

	if (frontend_read(key, fe))
		return true;

	any.addr[2] = address_is_v4(key->addr) ? bpf_htonl(0xffff) : 0;
	any.port = key->port;
	any.proto = key->proto;
	any.scope = LB_SCOPE_NODE_PORT;
	return frontend_read(&any, fe) && serves_node_ports(ctx, key->addr);
}

#endif
