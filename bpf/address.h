/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Addresses as all maps hold them: four words in network order, IPv4 mapped
 * into ::ffff:0:0/96.
 */
#ifndef LB_ADDRESS_H
#define LB_ADDRESS_H

#include "abi.h"

/* The few names of <linux/in.h> and <asm/errno.h> in use; the headers do not
 * go together with those that BCC includes.
 */
#define LB_IPPROTO_TCP 6
#define LB_IPPROTO_UDP 17
#define LB_ECONNREFUSED 111

static __always_inline void address_from_v4(__be32 addr[4], __be32 v4)
{
	addr[0] = 0;
	addr[1] = 0;
	addr[2] = bpf_htonl(0xffff);
	addr[3] = v4;
}

static __always_inline void address_copy(__be32 to[4], const __be32 from[4])
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

/* One branch, and not one for each word: the verifier would follow all of them. */
static __always_inline bool address_equal(const __be32 a[4], const __be32 b[4])
{
	__u32 difference = (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]);

	asm volatile("" : "+r"(difference));
	return !difference;
}

static __always_inline bool address_is_v4(const __be32 addr[4])
{
	__u32 difference = addr[0] | addr[1] | (addr[2] ^ bpf_htonl(0xffff));

	asm volatile("" : "+r"(difference));
	return !difference;
}

/* 127.0.0.0/8, and 0.0.0.0, which connect() takes for it. */
static __always_inline bool address_is_loopback_v4(const __be32 addr[4])
{
	return address_is_v4(addr) &&
	       ((addr[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000) || addr[3] == 0);
}

#endif
