/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Who a socket's owner is to session affinity. Its source address is not chosen
 * yet when it connects, but its network namespace is known, and that is one
 * client: a pod, or the node.
 */
#ifndef LB_AFFINITY_CLIENT_H
#define LB_AFFINITY_CLIENT_H

#include "abi.h"

static __always_inline void affinity_client(struct bpf_sock_addr *ctx, __u32 service,
					    struct affinity_key *key)
{
	__u64 netns = bpf_get_netns_cookie(ctx);

	key->client[0] = (__u32)netns;
	key->client[1] = (__u32)(netns >> 32);
	key->service = service;
	key->client_is_netns = 1;
}

#endif
