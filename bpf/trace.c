/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * The observers of `lbproxy trace`: programs of their own beside the datapath's, there only
 * while somebody looks. So looking costs nothing while nobody does. They read lbproxy's
 * maps, write only their own, and whatever they see goes on its way.
 *
 * Sockets are seen after lbproxy's hooks, which have put the backend in the place of what was
 * dialled; the socket's record has that. Packets are seen just before and just behind lbproxy's
 * program at a device: one that does not come out behind was dropped, answered or sent elsewhere.
 */
/* Compiled on maps that are made for it and go again: BCC may open pinned ones only with more
 * rights than observing takes. They are loaded on the datapath's.
 */
#define LB_DECLARE(type, key, value, name, rows, flags)                                            \
	BPF_F_TABLE(type, key, value, name, rows, flags)

#include "trace_abi.h"
#include "address.h"
#include "maps.h"
#include "packet.h"
#include "socket_record.h"

#define LB_GO_ON 1	 /* of programs in a cgroup */
#define LB_NEXT_ONE (-1) /* TCX_NEXT */

#define LB_OP_CONNECT 3
#define LB_OP_ESTABLISHED 4
#define LB_OP_TIMEOUT 8
#define LB_OP_STATE 10
#define LB_CALL_TIMEOUT 0x1
#define LB_CALL_STATE 0x4

#define LB_TCP_SYN_SENT 2
#define LB_TCP_FIN_WAIT1 4
#define LB_TCP_CLOSE 7
#define LB_TCP_CLOSE_WAIT 8

#define LB_FAMILY_IPV4 2
#define LB_SECOND_SHIFT 30 /* about a second of ns */

BPF_TABLE("array", __u32, struct trace_filter, trace_filter, 1);
BPF_TABLE("hash", __u32, __u32, trace_services, LB_TRACE_SERVICE_ROWS);
BPF_TABLE("hash", __u64, __u32, trace_netns, LB_TRACE_NETNS_ROWS);
BPF_TABLE("lru_hash", struct trace_tuple, struct trace_flow, trace_flows, LB_TRACE_FLOW_ROWS);
BPF_TABLE("lru_hash", __u64, struct trace_socket, trace_sockets, LB_TRACE_SOCKET_ROWS);
BPF_TABLE("percpu_array", __u32, struct trace_cpu, trace_cpus, 1);
BPF_RINGBUF_OUTPUT(trace_events, LB_TRACE_RING_PAGES);

/* BCC 0.26 does not declare it. */
static long (*lb_get_retval)(void) = (void *)186;

static __always_inline struct trace_filter *filter_get(void)
{
	__u32 first = 0;

	return trace_filter.lookup(&first);
}

static __always_inline struct trace_cpu *cpu_get(void)
{
	__u32 first = 0;

	return trace_cpus.lookup(&first);
}

/* Whether this CPU may still tell of something in this second. */
static __always_inline bool may_tell(struct trace_cpu *cpu, const struct trace_filter *f)
{
	__u64 second = bpf_ktime_get_ns() >> LB_SECOND_SHIFT;

	if (cpu->second != second) {
		cpu->second = second;
		cpu->count = 0;
	}
	if (cpu->count >= f->rate) {
		cpu->lost++;
		return false;
	}
	cpu->count++;
	return true;
}

static __always_inline bool tell(struct trace_cpu *cpu, struct trace_event *e)
{
	e->time_ns = bpf_ktime_get_ns();
	e->cpu = bpf_get_smp_processor_id();
	if (!trace_events.ringbuf_output(e, sizeof(*e), 0))
		return true;
	cpu->lost++;
	return false;
}

/* The service that an address and port belong to, also as one of its NodePorts. */
static __always_inline __u32 service_of(const __be32 addr[4], __be16 port, __u8 proto)
{
	struct frontend_key key = {.port = port, .proto = proto, .scope = LB_SCOPE_ADDRESS};
	struct node_address_key node = {};
	struct frontend *fe;

	address_copy(key.addr, addr);
	fe = frontends.lookup(&key);
	if (fe)
		return fe->service;
	address_copy(node.addr, addr);
	if (!address_is_loopback_v4(addr) && !node_addresses.lookup(&node))
		return LB_TRACE_NO_SERVICE;
	__builtin_memset(key.addr, 0, sizeof(key.addr));
	key.addr[2] = address_is_v4(addr) ? bpf_htonl(0xffff) : 0;
	key.scope = LB_SCOPE_NODE_PORT;
	fe = frontends.lookup(&key);
	return fe ? fe->service : LB_TRACE_NO_SERVICE;
}

static __always_inline bool is_there(const struct trace_filter *f, const __be32 addr[4],
				     __be16 port, __u8 proto)
{
	return address_equal(f->to_addr, addr) && (!f->to_port || f->to_port == port) &&
	       (!f->to_proto || f->to_proto == proto);
}

/* Whether something that was sent to this address is to be followed. */
static __always_inline bool is_wanted(const struct trace_filter *f, const __be32 addr[4],
				      __be16 port, __u8 proto, __u32 *service)
{
	*service = LB_TRACE_NO_SERVICE;
	if ((f->flags & LB_TRACE_TO) && !is_there(f, addr, port, proto))
		return false;
	*service = service_of(addr, port, proto);
	if (f->flags & LB_TRACE_SERVICE)
		return trace_services.lookup(service) != NULL;
	return (f->flags & LB_TRACE_TO) || *service != LB_TRACE_NO_SERVICE;
}

static __always_inline void tuple_reverse(struct trace_tuple *to, const struct trace_tuple *from)
{
	__builtin_memset(to, 0, sizeof(*to));
	address_copy(to->src, from->dst);
	address_copy(to->dst, from->src);
	to->sport = from->dport;
	to->dport = from->sport;
	to->proto = from->proto;
}

/* Follows packets with these addresses, and their answers. */
static __always_inline void flow_follow(const struct trace_tuple *t, __u64 id, __u32 seen)
{
	struct trace_flow flow = {.id = id, .seen = seen};
	struct trace_tuple back;
	struct trace_flow *known;

	known = trace_flows.lookup((struct trace_tuple *)t);
	if (known && known->id == id)
		return;
	trace_flows.update((struct trace_tuple *)t, &flow);
	flow.seen = 0;
	tuple_reverse(&back, t);
	trace_flows.update(&back, &flow);
}

/* --- sockets --- */

static __always_inline int on_socket(struct bpf_sock_addr *ctx, const __be32 addr[4], __u8 kind)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct trace_filter *f = filter_get();
	struct trace_cpu *cpu = cpu_get();
	struct trace_event e = {.kind = kind, .id = cookie};
	struct socket_record *record;
	struct trace_socket socket = {}, *known;

	if (!f || !cpu)
		return LB_GO_ON;
	e.netns = bpf_get_netns_cookie(ctx);
	if ((f->flags & LB_TRACE_FROM) && !trace_netns.lookup(&e.netns))
		return LB_GO_ON;
	e.proto = ctx->protocol;
	address_copy(e.dst, addr);
	e.dport = ctx->user_port;
	address_copy(e.outer, addr);
	e.outer_port = e.dport;
	record = record_of_backend(cookie, addr, e.dport);
	if (record) {
		address_copy(e.outer, record->frontend_addr);
		e.outer_port = record->frontend_port;
	}
	if (!is_wanted(f, e.outer, e.outer_port, e.proto, &e.service) &&
	    ((f->flags & LB_TRACE_SERVICE) || !(f->flags & LB_TRACE_TO) ||
	     !is_there(f, addr, e.dport, e.proto)))
		return LB_GO_ON;
	address_copy(socket.dialled, e.outer);
	address_copy(socket.chosen, e.dst);
	socket.dialled_port = e.outer_port;
	socket.chosen_port = e.dport;
	known = trace_sockets.lookup(&cookie);
	if (known && kind == LB_TRACE_SENDMSG && known->dialled_port == socket.dialled_port &&
	    known->chosen_port == socket.chosen_port &&
	    address_equal(known->dialled, socket.dialled) &&
	    address_equal(known->chosen, socket.chosen))
		return LB_GO_ON;
	trace_sockets.update(&cookie, &socket);
	if (!may_tell(cpu, f))
		return LB_GO_ON;
	e.error = -lb_get_retval();
	e.pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(&e.name, sizeof(e.name));
	tell(cpu, &e);
	return LB_GO_ON;
}

static __always_inline int on_socket_v4(struct bpf_sock_addr *ctx, __u8 kind)
{
	__be32 addr[4];

	address_from_v4(addr, ctx->user_ip4);
	return on_socket(ctx, addr, kind);
}

static __always_inline int on_socket_v6(struct bpf_sock_addr *ctx, __u8 kind)
{
	__be32 addr[4];

	addr[0] = ctx->user_ip6[0];
	addr[1] = ctx->user_ip6[1];
	addr[2] = ctx->user_ip6[2];
	addr[3] = ctx->user_ip6[3];
	return on_socket(ctx, addr, kind);
}

int lb_trace_connect4(struct bpf_sock_addr *ctx)
{
	return on_socket_v4(ctx, LB_TRACE_CONNECT);
}

int lb_trace_connect6(struct bpf_sock_addr *ctx)
{
	return on_socket_v6(ctx, LB_TRACE_CONNECT);
}

int lb_trace_sendmsg4(struct bpf_sock_addr *ctx)
{
	return on_socket_v4(ctx, LB_TRACE_SENDMSG);
}

int lb_trace_sendmsg6(struct bpf_sock_addr *ctx)
{
	return on_socket_v6(ctx, LB_TRACE_SENDMSG);
}

int lb_trace_release(struct bpf_sock *ctx)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct trace_event e = {.kind = LB_TRACE_RELEASE, .id = cookie};
	struct trace_filter *f = filter_get();
	struct trace_cpu *cpu = cpu_get();

	if (f && cpu && trace_sockets.lookup(&cookie) && may_tell(cpu, f)) {
		e.proto = ctx->protocol;
		e.service = LB_TRACE_NO_SERVICE;
		tell(cpu, &e);
	}
	return LB_GO_ON;
}

/* Both families are read, word by word, and then one is chosen: the compiler would join words, or
 * choose an address in the context and read from that, neither of which the verifier takes.
 */
static __always_inline void tcp_addresses(volatile struct bpf_sock_ops *ctx, struct trace_event *e)
{
	__be32 local = ctx->local_ip4, remote = ctx->remote_ip4;
	bool ipv4 = ctx->family == LB_FAMILY_IPV4;

	e->src[0] = ctx->local_ip6[0];
	e->src[1] = ctx->local_ip6[1];
	e->src[2] = ctx->local_ip6[2];
	e->src[3] = ctx->local_ip6[3];
	e->dst[0] = ctx->remote_ip6[0];
	e->dst[1] = ctx->remote_ip6[1];
	e->dst[2] = ctx->remote_ip6[2];
	e->dst[3] = ctx->remote_ip6[3];
	e->sport = bpf_htons(ctx->local_port);
	/* In network order, but as 32 bits. */
	e->dport = bpf_htons(bpf_ntohl(ctx->remote_port));
	if (ipv4) {
		address_from_v4(e->src, local);
		address_from_v4(e->dst, remote);
	}
}

/* How a TCP connection fares. Asks to be called again only for sockets that are followed. */
int lb_trace_tcp(struct bpf_sock_ops *ctx)
{
	struct trace_event e = {.service = LB_TRACE_NO_SERVICE, .proto = LB_IPPROTO_TCP};
	struct trace_filter *f;
	struct trace_tuple t = {};
	struct trace_cpu *cpu;
	__u32 op = ctx->op;

	if (op != LB_OP_CONNECT && op != LB_OP_ESTABLISHED && op != LB_OP_TIMEOUT &&
	    op != LB_OP_STATE)
		return LB_GO_ON;
	e.id = bpf_get_socket_cookie(ctx);
	f = filter_get();
	cpu = cpu_get();
	if (!f || !cpu || !trace_sockets.lookup(&e.id))
		return LB_GO_ON;
	if (op == LB_OP_CONNECT) {
		e.kind = LB_TRACE_SYN;
		tcp_addresses(ctx, &e);
		bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | LB_CALL_TIMEOUT |
						       LB_CALL_STATE);
		address_copy(t.src, e.src);
		address_copy(t.dst, e.dst);
		t.sport = e.sport;
		t.dport = e.dport;
		t.proto = e.proto;
		flow_follow(&t, e.id, 0);
	} else if (op == LB_OP_ESTABLISHED) {
		e.kind = LB_TRACE_ESTABLISHED;
		tcp_addresses(ctx, &e);
	} else if (op == LB_OP_TIMEOUT) {
		e.kind = LB_TRACE_TIMEOUT;
		e.tries = ctx->args[0];
		e.last = ctx->args[2];
	} else {
		e.kind = LB_TRACE_STATE;
		e.old_state = ctx->args[0];
		e.new_state = ctx->args[1];
		e.tries = ctx->segs_in;
		/* What comes between these is TCP's own affair. */
		if (e.new_state != LB_TCP_FIN_WAIT1 && e.new_state != LB_TCP_CLOSE_WAIT &&
		    (e.new_state != LB_TCP_CLOSE || e.old_state > LB_TCP_SYN_SENT))
			return LB_GO_ON;
	}
	e.srtt_us = ctx->srtt_us;
	e.sent_bytes = ctx->bytes_acked;
	e.received_bytes = ctx->bytes_received;
	if (may_tell(cpu, f))
		tell(cpu, &e);
	return LB_GO_ON;
}

/* --- packets --- */

/* Copies instead of pointers: pulling headers forward would change the packet for those behind. */
static __always_inline bool packet_load(struct __sk_buff *skb, __u32 at, void *to, __u32 length)
{
	return !bpf_skb_load_bytes_relative(skb, at, to, length, 1 /* BPF_HDR_START_NET */);
}

/* The addresses of the IP packet at an offset; `l4` is where its payload begins. */
static __always_inline bool addresses_at(struct __sk_buff *skb, __u32 at, bool ipv4,
					 struct trace_tuple *t, __u32 *l4)
{
	if (ipv4) {
		struct ipv4_header ip;

		if (!packet_load(skb, at, &ip, sizeof(ip)) || ip.version_ihl >> 4 != 4 ||
		    (ip.fragment & bpf_htons(0x1fff)))
			return false;
		address_from_v4(t->src, ip.src);
		address_from_v4(t->dst, ip.dst);
		t->proto = ip.proto;
		*l4 = at + (ip.version_ihl & 0xf) * 4;
		return true;
	}
	struct ipv6_header ip;

	if (!packet_load(skb, at, &ip, sizeof(ip)))
		return false;
	address_copy(t->src, ip.src);
	address_copy(t->dst, ip.dst);
	t->proto = ip.next;
	*l4 = at + sizeof(ip);
	return true;
}

/* Whose packet this is: also one inside another, or one that an ICMP error is about. */
static __always_inline bool packet_read(struct __sk_buff *skb, struct trace_tuple *t,
					struct trace_event *e)
{
	bool ipv4 = skb->protocol == bpf_htons(LB_ETH_IPV4);
	struct l4_ports ports;
	__u32 l4 = 0;

	if (!ipv4 && skb->protocol != bpf_htons(LB_ETH_IPV6))
		return false;
	if (!addresses_at(skb, 0, ipv4, t, &l4))
		return false;
	address_copy(e->outer, t->dst);
	if (t->proto == (ipv4 ? LB_IPPROTO_IPIP : LB_IPPROTO_IPV6)) {
		e->shape = LB_TRACE_TUNNELLED;
		if (!addresses_at(skb, l4, ipv4, t, &l4))
			return false;
	} else if (t->proto == LB_IPPROTO_ICMP || t->proto == LB_IPPROTO_ICMPV6) {
		e->shape = LB_TRACE_QUOTED;
		if (!packet_load(skb, l4, &e->icmp_type, 1) ||
		    !icmp_is_error(t->proto, e->icmp_type) ||
		    !addresses_at(skb, l4 + 8, ipv4, t, &l4))
			return false;
	}
	if (t->proto != LB_IPPROTO_TCP && t->proto != LB_IPPROTO_UDP && t->proto != LB_IPPROTO_SCTP)
		return false;
	if (!packet_load(skb, l4, &ports, sizeof(ports)))
		return false;
	t->sport = ports.source;
	t->dport = ports.destination;
	if (t->proto == LB_IPPROTO_TCP && e->shape != LB_TRACE_QUOTED)
		packet_load(skb, l4 + 13, &e->tcp_flags, 1);
	return true;
}

static __always_inline void tell_packet(struct __sk_buff *skb, struct trace_cpu *cpu,
					const struct trace_tuple *t, struct trace_event *e)
{
	address_copy(e->src, t->src);
	address_copy(e->dst, t->dst);
	e->sport = t->sport;
	e->dport = t->dport;
	e->proto = t->proto;
	e->ifindex = skb->ifindex;
	e->length = skb->len;
	tell(cpu, e);
}

static __always_inline int packet_before(struct __sk_buff *skb, __u8 stage)
{
	struct trace_event e = {.kind = LB_TRACE_BEFORE, .stage = stage};
	struct trace_filter *f = filter_get();
	struct trace_cpu *cpu = cpu_get();
	struct trace_tuple t = {};
	struct trace_flow *flow;
	__u32 bit = 1u << (stage & 1);

	if (!f || !cpu)
		return LB_NEXT_ONE;
	if (stage == LB_STAGE_INGRESS)
		cpu->armed_ingress = 0;
	else
		cpu->armed_egress = 0;
	if (!packet_read(skb, &t, &e))
		return LB_NEXT_ONE;
	e.service = LB_TRACE_NO_SERVICE;
	flow = trace_flows.lookup(&t);
	if (flow) {
		e.id = flow->id;
		if ((flow->seen & bit) && !(f->flags & LB_TRACE_EVERY_PACKET) &&
		    e.shape == LB_TRACE_PLAIN &&
		    !(e.tcp_flags & (LB_TCP_SYN | LB_TCP_FIN | LB_TCP_RST)))
			return LB_NEXT_ONE;
		if (e.shape == LB_TRACE_PLAIN)
			flow->seen |= bit;
	} else {
		if (e.shape == LB_TRACE_QUOTED ||
		    !is_wanted(f, t.dst, t.dport, t.proto, &e.service))
			return LB_NEXT_ONE;
		if ((f->flags & LB_TRACE_FROM) && !address_equal(f->from_addr, t.src))
			return LB_NEXT_ONE;
		e.id = LB_TRACE_PACKET_ID | bpf_ktime_get_ns();
		flow_follow(&t, e.id, bit);
	}
	if (!may_tell(cpu, f))
		return LB_NEXT_ONE;
	e.sequence = ++cpu->sequence;
	tell_packet(skb, cpu, &t, &e);
	if (stage == LB_STAGE_INGRESS)
		cpu->armed_ingress = e.id;
	else
		cpu->armed_egress = e.id;
	return LB_NEXT_ONE;
}

/* Nothing comes between a packet's two observers on a CPU: what was seen before is this one. */
static __always_inline int packet_after(struct __sk_buff *skb, __u8 stage)
{
	struct trace_event e = {.kind = LB_TRACE_AFTER, .stage = stage};
	struct trace_cpu *cpu = cpu_get();
	struct trace_tuple t = {};

	if (!cpu)
		return LB_NEXT_ONE;
	if (stage == LB_STAGE_INGRESS) {
		e.id = cpu->armed_ingress;
		cpu->armed_ingress = 0;
	} else {
		e.id = cpu->armed_egress;
		cpu->armed_egress = 0;
	}
	if (!e.id || !packet_read(skb, &t, &e))
		return LB_NEXT_ONE;
	e.service = LB_TRACE_NO_SERVICE;
	e.sequence = cpu->sequence;
	if (e.shape != LB_TRACE_QUOTED)
		flow_follow(&t, e.id, 0);
	tell_packet(skb, cpu, &t, &e);
	return LB_NEXT_ONE;
}

int lb_trace_before_ingress(struct __sk_buff *skb)
{
	return packet_before(skb, LB_STAGE_INGRESS);
}

int lb_trace_after_ingress(struct __sk_buff *skb)
{
	return packet_after(skb, LB_STAGE_INGRESS);
}

int lb_trace_before_egress(struct __sk_buff *skb)
{
	return packet_before(skb, LB_STAGE_EGRESS);
}

int lb_trace_after_egress(struct __sk_buff *skb)
{
	return packet_after(skb, LB_STAGE_EGRESS);
}
