/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * SCTP's checksum is a CRC-32C over the whole packet (RFC 9260, appendix A). A CRC is
 * linear: other ports at its beginning change it by the change itself, carried past
 * all the bytes behind it, which is a multiplication by a power of x. So the packet
 * need not be read.
 */
#ifndef LB_SCTP_H
#define LB_SCTP_H

#include "packet.h"

#define LB_CRC32C 0x82f63b78 /* the polynomial, lowest power first */
#define LB_CRC32C_X8 0x00800000

/* All ones if the lowest bit is set. The compiler must not make a branch of it: the
 * verifier would follow both ways, a thousand times over.
 */
static __always_inline __u32 mask_of(__u32 bit)
{
	__u32 mask = -(bit & 1);

	asm volatile("" : "+r"(mask));
	return mask;
}

/* a times b, modulo the polynomial. */
static __always_inline __u32 crc_multiply(__u32 a, __u32 b)
{
	__u32 product = 0;

#pragma clang loop unroll(disable)
	for (int bit = 31; bit >= 0; bit--) {
		product ^= b & mask_of(a >> bit);
		b = (b >> 1) ^ (LB_CRC32C & mask_of(b));
	}
	return product;
}

/* change, carried past so many bytes. */
static __always_inline __u32 crc_carried(__u32 change, __u32 bytes)
{
	__u32 power = LB_CRC32C_X8;

#pragma clang loop unroll(disable)
	for (int bit = 0; bit < 16; bit++) {
		__u32 wanted = mask_of(bytes >> bit);

		change = (crc_multiply(change, power) & wanted) | (change & ~wanted);
		power = crc_multiply(power, power);
	}
	return change;
}

/* Updates the checksum for ports that differ by these bits. */
static __always_inline bool sctp_update(struct __sk_buff *skb, const struct packet *p, __u32 change)
{
	struct sctp_header *sctp;
	__u32 crc;

	/* It covers the other fragments too, whose length is not known. */
	if (p->fragment)
		return true;
	crc = crc_carried(change, p->end - p->l4);
	sctp = packet_at(skb_data(skb), p->l4);
	if ((void *)(sctp + 1) > skb_end(skb))
		return false;
	sctp->checksum ^= crc;
	return true;
}

#endif
