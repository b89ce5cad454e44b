/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * What each socket was translated to, so that it can be shown the address it
 * dialled, and so that an unconnected UDP socket stays with its backend.
 *
 * Socket storage or an LRU row would cost a short connection three to six per
 * cent. Cookies are handed out in sequence, so a plain array indexed by the low
 * bits of the cookie serves: a row is claimed by compare-and-exchange and given
 * back when the socket is released. Only a socket whose row belongs to another
 * one that still lives goes to the spill map, as do further frontends that an
 * unconnected socket talks to; the row then says so, and only then is the spill
 * map ever looked at. The spill map forgets what has not been asked for longest.
 * A row is read and written only by the socket whose cookie it holds.
 */
#ifndef LB_SOCKET_RECORD_H
#define LB_SOCKET_RECORD_H

#include "address.h"
#include "counters.h"
#include "load.h"
#include "maps.h"

static __always_inline struct socket_record *record_row(__u64 cookie)
{
	__u32 row = cookie & (LB_ROWS_SOCKETS - 1);

	return sockets.lookup(&row);
}

static __always_inline bool record_has_frontend(const struct socket_record *record,
						const struct frontend_key *fe)
{
	return record->frontend_port == fe->port && address_equal(record->frontend_addr, fe->addr);
}

static __always_inline bool record_has_backend(const struct socket_record *record,
					       const __be32 addr[4], __be16 port)
{
	return record->backend_port == port && address_equal(record->backend_addr, addr);
}

static __always_inline void record_fill(struct socket_record *record, const struct frontend_key *fe,
					const struct backend *to, __u32 backend)
{
	address_copy(record->frontend_addr, fe->addr);
	address_copy(record->backend_addr, to->addr);
	record->frontend_port = fe->port;
	record->backend_port = to->port;
	record->backend = backend;
}

/* What a socket's own row stood for is closed, if it stood for anything. Spilled records are
 * not counted: they are few, and may be forgotten while their sockets live.
 */
static __always_inline void record_closed(const struct socket_record *row)
{
	if (row->backend)
		load_closed(row->backend, row->backend_addr, row->backend_port);
}

/* Fills a socket's own row, and counts it for its backend. */
static __always_inline void record_open(struct socket_record *row, const struct frontend_key *fe,
					const struct backend *to, __u32 backend)
{
	record_closed(row);
	record_fill(row, fe, to, backend);
	load_opened(to, backend);
}

static __always_inline void spill_key(struct socket_spill_key *key, __u64 cookie, __u8 kind)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->cookie = cookie;
	key->kind = kind;
}

static __always_inline void spill_key_at(struct socket_spill_key *key, __u64 cookie, __u8 kind,
					 const __be32 addr[4], __be16 port)
{
	spill_key(key, cookie, kind);
	address_copy(key->addr, addr);
	key->port = port;
}

static __always_inline void spill_put(struct socket_spill_key *key, struct socket_record *record)
{
	struct socket_record *row = record_row(record->cookie);

	if (row)
		row->spilled = 1;
	if (socket_spill.update(key, record))
		counter_bump(LB_COUNTER_SPILL_FAILED);
}

/* A spilled record. The row of one that was just evicted may already be another's. */
static __always_inline struct socket_record *spill_get(struct socket_spill_key *key)
{
	struct socket_record *found = socket_spill.lookup(key);

	return found && found->cookie == key->cookie ? found : NULL;
}

/* The socket's row, claimed if it was free; NULL where another socket lives in it. */
static __always_inline struct socket_record *record_claim(__u64 cookie)
{
	struct socket_record *row = record_row(cookie);
	__u64 owner;

	if (!row)
		return NULL;
	owner = row->cookie;
	if (!owner)
		owner = __sync_val_compare_and_swap(&row->cookie, 0, cookie);
	return !owner || owner == cookie ? row : NULL;
}

/* Remembers what a connected socket was translated to. */
static __always_inline void record_connected(__u64 cookie, const struct frontend_key *fe,
					     const struct backend *to, __u32 backend)
{
	struct socket_record *row = record_claim(cookie);
	struct socket_record spilled = {.cookie = cookie};
	struct socket_spill_key key;

	if (row) {
		record_open(row, fe, to, backend);
		return;
	}
	record_fill(&spilled, fe, to, backend);
	spill_key(&key, cookie, LB_SPILL_PEER);
	spill_put(&key, &spilled);
	counter_bump(LB_COUNTER_SPILLED);
}

/* Remembers where an unconnected socket's datagrams to this frontend go. Its
 * first frontend has the row; any further ones are spilled, both ways.
 */
static __always_inline void record_unconnected(__u64 cookie, const struct frontend_key *fe,
					       const struct backend *to, __u32 backend)
{
	struct socket_record *row = record_claim(cookie);
	struct socket_record spilled = {.cookie = cookie};
	struct socket_spill_key key;

	if (row && (row->backend == 0 || record_has_frontend(row, fe))) {
		record_open(row, fe, to, backend);
		return;
	}
	record_fill(&spilled, fe, to, backend);
	spill_key_at(&key, cookie, LB_SPILL_REVERSE, to->addr, to->port);
	spill_put(&key, &spilled);
	spill_key_at(&key, cookie, LB_SPILL_FORWARD, fe->addr, fe->port);
	spill_put(&key, &spilled);
	counter_bump(LB_COUNTER_SPILLED);
}

/* The record of an unconnected socket's datagrams to this frontend, or NULL. */
static __always_inline struct socket_record *record_of_frontend(__u64 cookie,
								const struct frontend_key *fe)
{
	struct socket_record *row = record_row(cookie);
	struct socket_spill_key key;

	if (row && row->cookie == cookie && record_has_frontend(row, fe))
		return row;
	if (!row || !row->spilled)
		return NULL;
	spill_key_at(&key, cookie, LB_SPILL_FORWARD, fe->addr, fe->port);
	return spill_get(&key);
}

/* The record that says which frontend this peer stands for, or NULL where the
 * socket talks to the peer itself.
 */
static __always_inline struct socket_record *record_of_backend(__u64 cookie, const __be32 addr[4],
							       __be16 port)
{
	struct socket_record *row = record_row(cookie);
	struct socket_record *found;
	struct socket_spill_key key;

	if (row && row->cookie == cookie && record_has_backend(row, addr, port))
		return row;
	if (!row || !row->spilled)
		return NULL;
	spill_key(&key, cookie, LB_SPILL_PEER);
	found = spill_get(&key);
	if (found && record_has_backend(found, addr, port))
		return found;
	spill_key_at(&key, cookie, LB_SPILL_REVERSE, addr, port);
	return spill_get(&key);
}

/* Forgets a socket that is released or was connected to something else. */
static __always_inline void record_forget(__u64 cookie)
{
	struct socket_record *row = record_row(cookie);
	struct socket_spill_key key;

	if (!row)
		return;
	if (row->cookie == cookie) {
		record_closed(row);
		row->backend = 0;
		__sync_val_compare_and_swap(&row->cookie, cookie, 0);
	}
	if (!row->spilled)
		return;
	spill_key(&key, cookie, LB_SPILL_PEER);
	socket_spill.delete(&key);
}

/* Forgets what a socket dialled before, now that it dials an address that is no
 * service: not even a backend's own address may be shown as the service then.
 */
static __always_inline void record_forget_at(__u64 cookie, const __be32 addr[4], __be16 port)
{
	struct socket_record *row = record_row(cookie);
	struct socket_spill_key key;

	record_forget(cookie);
	if (!row || !row->spilled)
		return;
	spill_key_at(&key, cookie, LB_SPILL_REVERSE, addr, port);
	socket_spill.delete(&key);
}

#endif
