/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Socket load balancing: a connect() or sendmsg() to a service address goes to
 * a backend chosen here, once, so that no packet has to be touched afterwards.
 * The socket is shown the service address as its peer.
 *
 * A dual-stack socket that dials ::ffff:a.b.c.d comes through the IPv6 hooks
 * with that very address, which is also how the maps hold IPv4.
 */
#include "affinity_client.h"
#include "frontend.h"
#include "select.h"
#include "socket_client.h"
#include "socket_record.h"

#define LB_ALLOW 1
#define LB_DENY 0

/* BCC 0.26 does not declare these. */
static long (*lb_set_retval)(int retval) = (void *)187;
static void *(*lb_skc_to_mptcp_sock)(void *sk) = (void *)196;

/* Refuses, or for LB_FRONTEND_DROP leaves the address alone: a service address is
 * nobody's, so the client waits as it would behind kube-proxy's drop rule.
 */
static __always_inline int no_backend(const struct frontend *fe)
{
	if (fe->flags & LB_FRONTEND_DROP) {
		counter_bump(LB_COUNTER_DROPPED);
		return LB_ALLOW;
	}
	count_refusal(fe->service);
	lb_set_retval(-LB_ECONNREFUSED);
	return LB_DENY;
}

static __always_inline void dialled_v4(struct bpf_sock_addr *ctx, struct frontend_key *key)
{
	address_from_v4(key->addr, ctx->user_ip4);
	key->port = ctx->user_port;
	key->proto = ctx->protocol;
	key->scope = LB_SCOPE_ADDRESS;
}

static __always_inline void dialled_v6(struct bpf_sock_addr *ctx, struct frontend_key *key)
{
	key->addr[0] = ctx->user_ip6[0];
	key->addr[1] = ctx->user_ip6[1];
	key->addr[2] = ctx->user_ip6[2];
	key->addr[3] = ctx->user_ip6[3];
	key->port = ctx->user_port;
	key->proto = ctx->protocol;
	key->scope = LB_SCOPE_ADDRESS;
}

static __always_inline void rewrite_v4(struct bpf_sock_addr *ctx, const __be32 addr[4], __be16 port)
{
	ctx->user_ip4 = addr[3];
	ctx->user_port = port;
}

static __always_inline void rewrite_v6(struct bpf_sock_addr *ctx, const __be32 addr[4], __be16 port)
{
	ctx->user_ip6[0] = addr[0];
	ctx->user_ip6[1] = addr[1];
	ctx->user_ip6[2] = addr[2];
	ctx->user_ip6[3] = addr[3];
	ctx->user_port = port;
}

/* Whether the socket is a subflow of MPTCP: made and ended by the kernel, which
 * runs no release hook for it, so that a record would stay for ever.
 */
static __always_inline bool is_subflow(struct bpf_sock_addr *ctx)
{
	if (!LB_MPTCP || ctx->protocol != LB_IPPROTO_TCP)
		return false;
	return lb_skc_to_mptcp_sock(ctx->sk) != NULL;
}

/* A backend for a connect() to key, or NULL; then *verdict says what to answer. */
static __always_inline struct backend *on_connect(struct bpf_sock_addr *ctx,
						  struct frontend_key *key, int *verdict)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct affinity_key client = {};
	struct frontend fe;
	struct backend *to;
	__u32 id = 0;

	*verdict = LB_ALLOW;
	if (!frontend_lookup(ctx, key, &fe) || handover_get(LB_HANDOVER_RETURN)) {
		/* A UDP socket, or a TCP one that was refused, may have dialled a service before.
		 */
		record_forget_at(cookie, key->addr, key->port);
		return NULL;
	}
	/* Whoever may not is left alone, and its packets are dropped on their way out. */
	if (!socket_is_admitted(ctx, key, &fe))
		return NULL;

	if (fe.affinity_s)
		affinity_client(ctx, fe.service, &client);
	to = fe.slot_count ? select_backend(&fe, cookie, &client, &id) : NULL;
	if (!to) {
		*verdict = no_backend(&fe);
		return NULL;
	}
	if (!is_subflow(ctx))
		record_connected(cookie, key, to, id);
	return to;
}

/* A backend for a datagram to key from an unconnected socket: the one this
 * socket's earlier datagrams went to while it serves, else a new choice.
 */
static __always_inline struct backend *on_sendmsg(struct bpf_sock_addr *ctx,
						  struct frontend_key *key, int *verdict)
{
	struct affinity_key client = {};
	struct socket_record *earlier;
	struct frontend fe;
	struct backend *to;
	__u64 cookie;
	__u32 id = 0;

	*verdict = LB_ALLOW;
	if (!frontend_lookup(ctx, key, &fe) || !socket_is_admitted(ctx, key, &fe))
		return NULL;

	cookie = bpf_get_socket_cookie(ctx);
	earlier = record_of_frontend(cookie, key);
	if (earlier) {
		to = backend_serving(&fe, earlier->backend);
		/* The id may have gone to another backend of the same service since. */
		if (to && record_has_backend(earlier, to->addr, to->port))
			return to;
	}
	if (socket_is_anothers(ctx, key, fe.service))
		return NULL;

	if (fe.affinity_s)
		affinity_client(ctx, fe.service, &client);
	to = fe.slot_count ? select_backend(&fe, cookie, &client, &id) : NULL;
	if (!to) {
		*verdict = no_backend(&fe);
		return NULL;
	}
	record_unconnected(cookie, key, to, id);
	return to;
}

int lb_connect4(struct bpf_sock_addr *ctx)
{
	struct frontend_key key = {};
	struct backend *to;
	int verdict;

	dialled_v4(ctx, &key);
	to = on_connect(ctx, &key, &verdict);
	if (to)
		rewrite_v4(ctx, to->addr, to->port);
	return verdict;
}

int lb_connect6(struct bpf_sock_addr *ctx)
{
	struct frontend_key key = {};
	struct backend *to;
	int verdict;

	dialled_v6(ctx, &key);
	to = on_connect(ctx, &key, &verdict);
	if (to)
		rewrite_v6(ctx, to->addr, to->port);
	return verdict;
}

int lb_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct frontend_key key = {};
	struct backend *to;
	int verdict;

	dialled_v4(ctx, &key);
	to = on_sendmsg(ctx, &key, &verdict);
	if (to)
		rewrite_v4(ctx, to->addr, to->port);
	return verdict;
}

int lb_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct frontend_key key = {};
	struct backend *to;
	int verdict;

	dialled_v6(ctx, &key);
	to = on_sendmsg(ctx, &key, &verdict);
	if (to)
		rewrite_v6(ctx, to->addr, to->port);
	return verdict;
}

/* The way back: recvmsg() and getpeername() name the backend; the socket is
 * shown the frontend that it dialled.
 */
static __always_inline int show_frontend_v4(struct bpf_sock_addr *ctx)
{
	struct frontend_key peer = {};
	struct socket_record *record;

	dialled_v4(ctx, &peer);
	record = record_of_backend(bpf_get_socket_cookie(ctx), peer.addr, peer.port);
	if (record)
		rewrite_v4(ctx, record->frontend_addr, record->frontend_port);
	return LB_ALLOW;
}

static __always_inline int show_frontend_v6(struct bpf_sock_addr *ctx)
{
	struct frontend_key peer = {};
	struct socket_record *record;

	dialled_v6(ctx, &peer);
	record = record_of_backend(bpf_get_socket_cookie(ctx), peer.addr, peer.port);
	if (record)
		rewrite_v6(ctx, record->frontend_addr, record->frontend_port);
	return LB_ALLOW;
}

int lb_recvmsg4(struct bpf_sock_addr *ctx)
{
	return show_frontend_v4(ctx);
}

int lb_recvmsg6(struct bpf_sock_addr *ctx)
{
	return show_frontend_v6(ctx);
}

int lb_getpeername4(struct bpf_sock_addr *ctx)
{
	return show_frontend_v4(ctx);
}

int lb_getpeername6(struct bpf_sock_addr *ctx)
{
	return show_frontend_v6(ctx);
}

int lb_sock_release(struct bpf_sock *ctx)
{
	record_forget(bpf_get_socket_cookie(ctx));
	return LB_ALLOW;
}
