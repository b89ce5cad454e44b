/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * When a flow is masqueraded, as whom, and with which port.
 */
#ifndef LB_MASQUERADE_H
#define LB_MASQUERADE_H

#include "client.h"

#define LB_MOST_FRESH_PORTS 64
#define LB_MOST_PORTS_TRIED 16
#define LB_FIB_SKIP_NEIGHBOUR 0x10 /* BPF_FIB_LOOKUP_SKIP_NEIGH, Linux 6.3 */
#define LB_FIB_NO_NEIGHBOUR 7
#define LB_FIB_TOO_BIG 8

/* The route towards a backend: its device, 0 where there is none. */
static __always_inline __u32 route_device(void *ctx, __u32 ifindex, const __be32 src[4],
					  const __be32 dst[4], bool ipv4)
{
	struct bpf_fib_lookup fib = {.ifindex = ifindex};
	long result;

	if (ipv4) {
		fib.family = LB_AF_INET;
		fib.ipv4_src = src[3];
		fib.ipv4_dst = dst[3];
	} else {
		fib.family = LB_AF_INET6;
		address_copy(fib.ipv6_src, src);
		address_copy(fib.ipv6_dst, dst);
	}
	result = bpf_fib_lookup(ctx, &fib, sizeof(fib), LB_FIB_SKIP_NEIGHBOUR);
	/* A packet that is too big is the kernel's to cut or to answer. */
	if (result == 0 || result == LB_FIB_NO_NEIGHBOUR || result == LB_FIB_TOO_BIG)
		return fib.ifindex;
	return 0;
}

static __always_inline bool address_is_zero(const __be32 addr[4])
{
	return !(addr[0] | addr[1] | addr[2] | addr[3]);
}

/* The address of this node that a flow through a device is masqueraded as; false for none. */
static __always_inline bool masquerade_address(const struct settings *set, __u32 ifindex, bool ipv4,
					       __be32 addr[4])
{
	struct device *device = device_find(ifindex);

	if (device)
		address_copy(addr, ipv4 ? device->addr4 : device->addr6);
	if (!device || address_is_zero(addr))
		address_copy(addr, ipv4 ? set->node4_addr : set->node6_addr);
	return !address_is_zero(addr);
}

/* Whether a socket of this node would take what the backend sends to this port. */
static __always_inline bool port_is_used_here(void *ctx, const struct flow_key *reply, bool ipv4)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = sizeof(tuple.ipv4);
	struct bpf_sock *sk;

	if (ipv4) {
		tuple.ipv4.saddr = reply->src[3];
		tuple.ipv4.daddr = reply->dst[3];
		tuple.ipv4.sport = reply->sport;
		tuple.ipv4.dport = reply->dport;
	} else {
		size = sizeof(tuple.ipv6);
		address_copy(tuple.ipv6.saddr, reply->src);
		address_copy(tuple.ipv6.daddr, reply->dst);
		tuple.ipv6.sport = reply->sport;
		tuple.ipv6.dport = reply->dport;
	}
	if (reply->proto == LB_IPPROTO_TCP)
		sk = bpf_skc_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else if (reply->proto == LB_IPPROTO_UDP)
		sk = bpf_sk_lookup_udp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else
		return false;
	if (!sk)
		return false;
	bpf_sk_release(sk);
	return true;
}

/* Whether the contract demands it (MASQ-1 to MASQ-5, MASQ-8). */
static __always_inline bool wants_masquerade(const struct settings *set, const struct frontend *fe,
					     const struct packet *p, const struct backend *to,
					     bool pod, bool outside_row)
{
	bool wanted;

	if (address_equal(p->tuple.src, to->addr))
		return true;
	if ((set->flags & LB_SETTING_KEEP_CLIENT) && (to->sets & LB_SET_HERE))
		return false;
	if (fe->flags & LB_FRONTEND_DSR)
		return false;
	if (fe->kind == LB_KIND_CLUSTER_IP)
		wanted = (set->flags & LB_SETTING_MASQUERADE_ALL) ||
			 (detector_exists(set, p->ipv4) && !pod);
	else
		wanted = !outside_row && !((fe->flags & LB_FRONTEND_EXTERNAL_LOCAL) && pod);
	/* Last, since it takes longest. */
	return wanted && !node_address_find(to->addr);
}

#endif
