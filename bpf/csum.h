/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Internet checksums (RFC 1071), and what they become when part of what they cover
 * changes (RFC 1624).
 */
#ifndef LB_CSUM_H
#define LB_CSUM_H

#include "packet.h"

static __always_inline __u16 csum_fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* The checksum of something whose sum has grown by more. */
static __always_inline __u16 csum_grown(__u16 checksum, __u32 more)
{
	return ~csum_fold((__u32)(__u16)~checksum + csum_fold(more));
}

/* Of two sums that are the same to a checksum, 0 and 0xffff, one. */
static __always_inline __u16 csum_rest(__u16 sum)
{
	return sum == 0xffff ? 0 : sum;
}

/* A sum of words in 32 bits. The helper for it, bpf_csum_diff, takes longer than it does. */
static __always_inline __u32 csum_short(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (sum & 0xffffffff) + (sum >> 32);
}

/* The sum of a packet's addresses, as words. */
static __always_inline __u64 addresses_sum(const __be32 src[4], const __be32 dst[4], bool ipv4)
{
	__u64 sum = (__u64)src[3] + dst[3];

	/* The upper words of mapped addresses are not in an IPv4 packet. */
	if (!ipv4)
		sum += (__u64)src[0] + src[1] + src[2] + dst[0] + dst[1] + dst[2];
	return sum;
}

/* What a sum over a packet's addresses grows by when they become these. */
static __always_inline __u32 address_difference(const struct packet *p, const __be32 src[4],
						const __be32 dst[4])
{
	__u64 words = p->ipv4 ? 2 : 8;

	/* A word less is its complement more. */
	return csum_short(addresses_sum(src, dst, p->ipv4) + words * 0xffffffff -
			  addresses_sum(p->tuple.src, p->tuple.dst, p->ipv4));
}

#endif
