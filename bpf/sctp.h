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

#define LB_CRC32C 0x82f63b78	     /* the polynomial, lowest power first */
#define LB_CRC32C_INVERSE 0x6f5389f8 /* x^64 divided by it, without x^32 */
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

/* Those bits of a product without carries that are so far from the lowest, modulo 4. Of
 * each factor every fourth bit is multiplied at a time: what is carried from one stays in
 * the three above it. Not a loop over bits, whose every step the verifier would follow.
 */
static __always_inline __u64 product_bits(__u64 a, __u64 b, int from)
{
	__u64 every = 0x11111111, sum = 0;

	for (int at = 0; at < 4; at++)
		sum ^= (a & every << at) * (b & every << ((from - at) & 3));
	return sum & 0x1111111111111111ULL << from;
}

/* a times b, as polynomials: without carries, and with the lowest power first. */
static __always_inline __u64 polynomials_multiply(__u32 a, __u32 b)
{
	return (product_bits(a, b, 0) | product_bits(a, b, 1) | product_bits(a, b, 2) |
		product_bits(a, b, 3))
	       << 1;
}

/* a times b, modulo the polynomial: what is above x^31 is divided by it, which is to
 * multiply by its inverse and cut the rest off (Barrett), and taken away that often.
 */
static __always_inline __u32 crc_multiply(__u32 a, __u32 b)
{
	__u64 product = polynomials_multiply(a, b);
	__u32 above = product,
	      times = above ^ (__u32)polynomials_multiply(above, LB_CRC32C_INVERSE);

	return product >> 32 ^ polynomials_multiply(times, LB_CRC32C) >> 32;
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
