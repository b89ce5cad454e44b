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

/* The checksum of an IPv4 header without options, in which that is still zero. */
static __always_inline __u16 ipv4_checksum(const struct ipv4_header *ip)
{
	const __u32 *words = (const __u32 *)ip;

	return ~csum_fold(csum_short((__u64)words[0] + words[1] + words[2] + words[3] + words[4]));
}

/* The sum of an address, as words. The upper ones of mapped addresses are in no IPv4 packet. */
static __always_inline __u64 address_sum(const __be32 addr[4], bool ipv4)
{
	return ipv4 ? addr[3] : (__u64)addr[0] + addr[1] + addr[2] + addr[3];
}

static __always_inline __u64 addresses_sum(const __be32 src[4], const __be32 dst[4], bool ipv4)
{
	return address_sum(src, ipv4) + address_sum(dst, ipv4);
}

/* What a sum over an address grows by when it becomes another. */
static __always_inline __u32 address_change(const __be32 from[4], const __be32 to[4], bool ipv4)
{
	__u64 words = ipv4 ? 1 : 4;

	/* A word less is its complement more. */
	return csum_short(address_sum(to, ipv4) + words * 0xffffffff - address_sum(from, ipv4));
}

/* What a sum over a packet's addresses grows by when they become these. */
static __always_inline __u32 address_difference(const struct packet *p, const __be32 src[4],
						const __be32 dst[4])
{
	return csum_short((__u64)address_change(p->tuple.src, src, p->ipv4) +
			  address_change(p->tuple.dst, dst, p->ipv4));
}

#endif
