/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * What a service makes of a socket's owner: whether it may use a frontend with source
 * ranges, and whether it is a pod to kube-proxy's local detector. The source address
 * is not chosen yet when a socket connects, unless it is bound; else it is taken for
 * the one that the agent has found in the socket's network namespace.
 */
#ifndef LB_SOCKET_CLIENT_H
#define LB_SOCKET_CLIENT_H

#include "client.h"
#include "flow.h"
#include "frontend.h"

/* The address that a socket's packets will come from; false where nobody knows. */
static __always_inline bool socket_source(struct bpf_sock_addr *ctx, bool ipv4, __be32 addr[4])
{
	struct netns_key key = {.cookie = bpf_get_netns_cookie(ctx), .family = ipv4 ? 4 : 6};
	struct bpf_sock *sk = ctx->sk;
	struct netns_address *known;

	if (sk && sk->family == LB_AF_INET && ipv4 && sk->src_ip4) {
		address_from_v4(addr, sk->src_ip4);
		return true;
	}
	if (sk && sk->family == LB_AF_INET6) {
		addr[0] = sk->src_ip6[0];
		addr[1] = sk->src_ip6[1];
		addr[2] = sk->src_ip6[2];
		addr[3] = sk->src_ip6[3];
		if (addr[0] | addr[1] | addr[3])
			return true;
	}
	known = netns_addresses.lookup(&key);
	if (known)
		address_copy(addr, known->addr);
	return known != NULL;
}

/* The flow of what an unconnected UDP socket sends to a frontend, as packets of it come in;
 * false where its source is not known.
 */
static __always_inline bool socket_flow(struct bpf_sock_addr *ctx, const struct frontend_key *to,
					struct flow_key *flow)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk || !socket_source(ctx, address_is_v4(to->addr), flow->src))
		return false;
	address_copy(flow->dst, to->addr);
	flow->sport = bpf_htons(sk->src_port);
	flow->dport = to->port;
	flow->proto = to->proto;
	flow->stage = LB_STAGE_INGRESS;
	flow->pad[0] = 0;
	flow->pad[1] = 0;
	return true;
}

/* Whether what an unconnected UDP socket sends is left to another proxy: it belongs to a
 * flow that is held, or begins one while flows are given back or learned.
 */
static __always_inline bool socket_is_anothers(struct bpf_sock_addr *ctx,
					       const struct frontend_key *to, __u32 service)
{
	bool learn = handover_get(LB_HANDOVER_LEARN) & LB_LEARN_SOCKETS;
	struct flow_key tuple, key;
	struct flow row, *found;
	__u32 now;

	if (handover_get(LB_HANDOVER_RETURN) && !learn)
		return true;
	if (!learn && !handover_get(LB_HANDOVER_HELD_UDP))
		return false;
	if (!socket_flow(ctx, to, &tuple))
		return learn;
	now = tick_now();
	found = flow_find(&tuple, now);
	if (found && flow_is_held(found->state))
		return true;
	if (learn)
		flow_hold(&tuple, service, &key, &row, now);
	return learn;
}

/* A pod whose address is not known yet is taken for what it most likely is. */
static __always_inline bool socket_is_of_pod(const struct settings *set, bool ipv4, bool known,
					     const __be32 addr[4])
{
	if (set->flags & LB_SETTING_PODS_BY_DEVICE)
		return true;
	if (ipv4)
		return (set->flags & LB_SETTING_PODS_BY_IPV4) &&
		       (!known || is_within(addr, set->pods4_addr, set->pods4_mask));
	return (set->flags & LB_SETTING_PODS_BY_IPV6) &&
	       (!known || is_within(addr, set->pods6_addr, set->pods6_mask));
}

/* Whether a socket may use a frontend that it dialled; fe becomes the row for clients
 * outside the cluster where it counts as one (ETP-6).
 */
static __always_inline bool socket_is_admitted(struct bpf_sock_addr *ctx, struct frontend_key *key,
					       struct frontend *fe)
{
	struct settings *set = settings_get();
	bool ipv4 = address_is_v4(key->addr), known;
	__be32 addr[4];

	if (!set || !(fe->flags & (LB_FRONTEND_EXTERNAL_LOCAL | LB_FRONTEND_SOURCE_RANGES)))
		return true;
	known = socket_source(ctx, ipv4, addr);
	if ((fe->flags & LB_FRONTEND_EXTERNAL_LOCAL) &&
	    bpf_get_netns_cookie(ctx) != set->host_netns &&
	    !socket_is_of_pod(set, ipv4, known, addr)) {
		struct frontend_key outside = *key;

		if (fe->kind == LB_KIND_NODE_PORT) {
			outside.addr[0] = 0;
			outside.addr[1] = 0;
			outside.addr[2] = ipv4 ? bpf_htonl(0xffff) : 0;
			outside.addr[3] = 0;
			outside.scope = LB_SCOPE_NODE_PORT;
		}
		outside.scope |= LB_SCOPE_OUTSIDE;
		if (!frontend_read(&outside, fe))
			return false;
	}
	if (!(fe->flags & LB_FRONTEND_SOURCE_RANGES))
		return true;
	/* Nobody at all serves it: that is told to everyone, as in iptables mode (SR-10). */
	if (!fe->slot_count && !(fe->flags & LB_FRONTEND_DROP))
		return true;
	if (known && source_is_allowed(fe->service, addr))
		return true;
	counter_bump(LB_COUNTER_SOURCE_DENIED);
	return false;
}

#endif
