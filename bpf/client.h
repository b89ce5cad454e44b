/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Who sends a packet to a service, as kube-proxy's local detector tells it
 * (KEP-2450), and whether it may.
 */
#ifndef LB_CLIENT_H
#define LB_CLIENT_H

#include "flow.h"

static __always_inline bool is_within(const __be32 addr[4], const __be32 net[4],
				      const __be32 mask[4])
{
	return (addr[0] & mask[0]) == net[0] && (addr[1] & mask[1]) == net[1] &&
	       (addr[2] & mask[2]) == net[2] && (addr[3] & mask[3]) == net[3];
}

/* Whether an address is known not to be the node's, without a look-up: as most are. */
static __always_inline bool is_stranger(const __be32 addr[4])
{
	__u32 place = addr[3] * LB_STRANGERS_FACTOR >> LB_STRANGERS_SHIFT;
	struct settings *set = settings_get();

	return set && (set->strangers[place >> 3] >> (place & 7) & 1);
}

static __always_inline struct node_address *node_address_find(const __be32 addr[4])
{
	struct node_address_key key;

	if (is_stranger(addr))
		return NULL;
	address_copy(key.addr, addr);
	return node_addresses.lookup(&key);
}

static __always_inline struct device *device_find(__u32 ifindex)
{
	return devices.lookup(&ifindex);
}

/* Whether pods can be told from others, for packets of this family. */
static __always_inline bool detector_exists(const struct settings *set, bool ipv4)
{
	return set->flags & (LB_SETTING_PODS_BY_DEVICE |
			     (ipv4 ? LB_SETTING_PODS_BY_IPV4 : LB_SETTING_PODS_BY_IPV6));
}

/* Whether an address may be a sender's at all, on a wire: there is no answering others, and
 * the kernel drops what has them (RFC 1122, 3.2.1.3; RFC 4291, 2.5 and 2.7).
 */
static __always_inline bool may_send(const __be32 addr[4])
{
	__u32 first;

	if (address_is_v4(addr)) {
		first = bpf_ntohl(addr[3]) >> 24;
		return first && first != 127 && first < 224;
	}
	if (!(addr[0] | addr[1] | addr[2]) && bpf_ntohl(addr[3]) <= 1)
		return false;
	return bpf_ntohl(addr[0]) >> 24 != 0xff;
}

static __always_inline bool is_from_pod(const struct settings *set, const struct packet *p,
					__u32 ifindex)
{
	if (set->flags & LB_SETTING_PODS_BY_DEVICE) {
		struct device *device = device_find(ifindex);

		return device && (device->flags & LB_DEVICE_PODS);
	}
	if (p->ipv4)
		return (set->flags & LB_SETTING_PODS_BY_IPV4) &&
		       is_within(p->tuple.src, set->pods4_addr, set->pods4_mask);
	return (set->flags & LB_SETTING_PODS_BY_IPV6) &&
	       is_within(p->tuple.src, set->pods6_addr, set->pods6_mask);
}

/* Whether loadBalancerSourceRanges let this address in. */
static __always_inline bool source_is_allowed(__u32 service, const __be32 addr[4])
{
	struct source_range_key key = {.prefix_bits = 32 + 128, .service = bpf_htonl(service)};

	address_copy(key.addr, addr);
	return source_ranges.lookup(&key) != NULL;
}

#endif
