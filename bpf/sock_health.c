/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * How the connections of this node's sockets to backends fare: how long a handshake
 * takes, whether it fails and why, and whether an open connection is cut off.
 *
 * The kernel calls this for every TCP socket of the cgroup as it connects. Only those
 * that have been led to a backend, so that they have a record, ask for more calls. No
 * packet is looked at.
 *
 * What an application does itself never counts against a backend: sock_release forgets
 * the record before close() does anything. What somebody else does to a socket
 * (SOCK_DESTROY) is told apart by the error that it leaves.
 */
#include "health.h"
#include "socket_record.h"

#define LB_ENETUNREACH 101
#define LB_ECONNRESET 104
#define LB_ETIMEDOUT 110
#define LB_EHOSTUNREACH 113

#define LB_TEXT_OF(value) #value
#define LB_TEXT(macro) LB_TEXT_OF(macro)

/* Others may ask for calls, too, and nobody knows who has asked for which: none is taken back. */
#define LB_CALLS (BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG)

#define LB_RTT_SHIFT 3 /* srtt_us is in eighths of a microsecond */

#if LB_BTF
/* BCC 0.26 does not declare it. */
static void *(*lb_skc_to_tcp_sock)(void *sk) = (void *)137;
#endif

/* What a connected TCP socket was led to, or NULL. */
static __always_inline struct socket_record *record_of_stream(__u64 cookie)
{
	struct socket_record *row = record_row(cookie);
	struct socket_spill_key key;

	if (!row || row->cookie == cookie)
		return row;
	if (!row->spilled)
		return NULL;
	spill_key(&key, cookie, LB_SPILL_PEER);
	return spill_get(&key);
}

static __always_inline struct backend_health *health_of_record(const struct socket_record *record)
{
	return health_of(record->backend, record->backend_addr, record->backend_port, 0);
}

/* Why the kernel gave a socket up; 0 where nothing went wrong. */
static __always_inline __u32 socket_error(struct bpf_sock_ops *ctx, __u32 before)
{
#if LB_BTF
	struct bpf_sock *sk = ctx->sk;
	void *tp = sk ? lb_skc_to_tcp_sock(sk) : NULL;
	__u32 error = 0;

	/* tp->inet_conn.icsk_inet.sk.sk_err: the loader knows where that is in this kernel. */
	if (tp)
		asm volatile("%0 = *(u32 *)(%1 + " LB_TEXT(LB_SK_ERR) ")" : "=r"(error) : "r"(tp));
	return error;
#else
	if (before == BPF_TCP_SYN_SENT)
		return ctx->segs_in ? LB_ECONNREFUSED : 0;
	/* Out of the others a socket also comes as both sides have closed theirs. */
	return before == BPF_TCP_ESTABLISHED || before == BPF_TCP_FIN_WAIT1 ? LB_ECONNRESET : 0;
#endif
}

static __always_inline void connection_failed(struct bpf_sock_ops *ctx,
					      const struct socket_record *record,
					      struct backend_health *to)
{
	__u32 before = ctx->args[0];
	bool connecting = before == BPF_TCP_SYN_SENT;
	__u32 error = socket_error(ctx, before);

	if (error == LB_ECONNREFUSED && connecting)
		__sync_fetch_and_add(&to->refused, 1);
	else if (error == LB_ECONNRESET && !connecting)
		__sync_fetch_and_add(&to->resets, 1);
	else if (error != LB_ETIMEDOUT && error != LB_EHOSTUNREACH && error != LB_ENETUNREACH)
		return;
	else if (!connecting)
		__sync_fetch_and_add(&to->lost, 1);
	else if (!record->pad_unanswered) /* else it counts already */
		__sync_fetch_and_add(&to->unanswered, 1);
}

static __always_inline void state_changed(struct bpf_sock_ops *ctx)
{
	struct socket_record *record;
	struct backend_health *to;

	if (ctx->args[1] != BPF_TCP_CLOSE && ctx->args[1] != BPF_TCP_CLOSE_WAIT)
		return;
	record = record_of_stream(bpf_get_socket_cookie(ctx));
	to = record ? health_of_record(record) : NULL;
	if (!to)
		return;
	if (ctx->args[1] == BPF_TCP_CLOSE)
		connection_failed(ctx, record, to);
	else
		health_rtt(to, ctx->srtt_us >> LB_RTT_SHIFT);
}

int lb_sock_health(struct bpf_sock_ops *ctx)
{
	struct socket_record *record;
	struct backend_health *to;

	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		record = record_of_stream(bpf_get_socket_cookie(ctx));
		if (record) {
			record->pad_unanswered = 0;
			bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | LB_CALLS);
		}
		return 1;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		if (!(ctx->bpf_sock_ops_cb_flags & BPF_SOCK_OPS_STATE_CB_FLAG))
			return 1;
		record = record_of_stream(bpf_get_socket_cookie(ctx));
		to = record ? health_of_record(record) : NULL;
		if (to)
			health_established(to, ctx->srtt_us >> LB_RTT_SHIFT);
		return 1;
	case BPF_SOCK_OPS_RTO_CB:
		/* The SYN went unanswered for a second. How it ends matters no more. */
		if (ctx->state != BPF_TCP_SYN_SENT)
			return 1;
		record = record_of_stream(bpf_get_socket_cookie(ctx));
		if (!record || record->pad_unanswered)
			return 1;
		record->pad_unanswered = 1;
		to = health_of_record(record);
		if (to)
			__sync_fetch_and_add(&to->unanswered, 1);
		return 1;
	case BPF_SOCK_OPS_STATE_CB:
		state_changed(ctx);
		return 1;
	}
	return 1;
}
