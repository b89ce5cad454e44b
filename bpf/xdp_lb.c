/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * The short way for flows between two other hosts: a packet that only passes this node
 * is translated for both ends at once and sent back out of the device it came in on,
 * before the kernel makes anything of it. Whatever is not plainly such a packet is
 * left as it is: tc is attached too, and does all there is to do.
 */
#include "csum.h"
#include "flow.h"
#include "masquerade.h"
#include "open.h"

/* Changes a TCP or UDP checksum; false where it is not one yet, but for the device to
 * complete, as on packets that were made on this machine: then it covers nothing but
 * the pseudo header, and it is tc that knows how to change it.
 */
static __always_inline bool xdp_checksum(const struct packet *p, __u16 *checksum,
					 const struct ends *to)
{
	__u64 pseudo = addresses_sum(p->tuple.src, p->tuple.dst, p->ipv4);
	struct l4_ports from = {p->tuple.sport, p->tuple.dport};
	struct l4_ports want = {to->sport, to->dport};
	__u32 difference;

	pseudo += (__u64)bpf_htonl(p->end - p->l4) + bpf_htonl(p->tuple.proto);
	if (*checksum == csum_fold(csum_short(pseudo)))
		return false;
	/* None at all, over IPv4. */
	if (p->tuple.proto == LB_IPPROTO_UDP && !*checksum)
		return true;
	difference = csum_short((__u64)address_difference(p, to->src, to->dst) + *(__u32 *)&want +
				(__u32) ~*(__u32 *)&from);
	*checksum = csum_grown(*checksum, difference);
	if (p->tuple.proto == LB_IPPROTO_UDP && !*checksum)
		*checksum = 0xffff;
	return true;
}

/* Where the packet goes next; false unless that is out of the same device. */
static __always_inline bool xdp_route(struct xdp_md *ctx, const struct packet *p,
				      const struct ends *to, struct bpf_fib_lookup *fib)
{
	fib->ifindex = ctx->ingress_ifindex;
	fib->tot_len = p->end - p->l3;
	if (p->ipv4) {
		fib->family = LB_AF_INET;
		fib->ipv4_src = p->tuple.src[3];
		fib->ipv4_dst = to->dst[3];
	} else {
		fib->family = LB_AF_INET6;
		address_copy(fib->ipv6_src, p->tuple.src);
		address_copy(fib->ipv6_dst, to->dst);
	}
	return bpf_fib_lookup(ctx, fib, sizeof(*fib), 0) == 0 &&
	       fib->ifindex == ctx->ingress_ifindex;
}

static __always_inline bool mac_equal(const __u8 a[6], const __u8 b[6])
{
	return *(__u16 *)a == *(__u16 *)b && *(__u16 *)(a + 2) == *(__u16 *)(b + 2) &&
	       *(__u16 *)(a + 4) == *(__u16 *)(b + 4);
}

/* Writes what the packet becomes; false, and nothing written, where it can not be done here. */
static __always_inline bool xdp_rewrite(struct xdp_md *ctx, const struct packet *p,
					const struct ends *to, const struct bpf_fib_lookup *fib)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	void *l3 = packet_at(data, p->l3), *l4 = packet_at(data, p->l4);
	struct eth_header *eth = data;
	__u16 *checksum;

	if ((void *)(eth + 1) > data_end || !mac_equal(eth->dst, fib->smac))
		return false;
	if (p->tuple.proto == LB_IPPROTO_TCP) {
		if (l4 + sizeof(struct tcp_header) > data_end)
			return false;
		checksum = &((struct tcp_header *)l4)->checksum;
	} else {
		if (l4 + sizeof(struct udp_header) > data_end)
			return false;
		checksum = &((struct udp_header *)l4)->checksum;
	}
	if (p->ipv4) {
		struct ipv4_header *ip = l3;
		__u32 difference;

		if ((void *)(ip + 1) > data_end || ip->ttl <= 1 || !xdp_checksum(p, checksum, to))
			return false;
		difference = csum_fold(address_difference(p, to->src, to->dst));
		ip->src = to->src[3];
		ip->dst = to->dst[3];
		ip->ttl--;
		/* One less in the upper byte of its word, which is in network order. */
		ip->checksum = csum_grown(ip->checksum, difference + (__u16)~bpf_htons(0x100));
	} else {
		struct ipv6_header *ip = l3;

		if ((void *)(ip + 1) > data_end || ip->hops <= 1 || !xdp_checksum(p, checksum, to))
			return false;
		address_copy(ip->src, to->src);
		address_copy(ip->dst, to->dst);
		ip->hops--;
	}
	((struct l4_ports *)l4)->source = to->sport;
	((struct l4_ports *)l4)->destination = to->dport;
	__builtin_memcpy(eth->dst, fib->dmac, 6);
	__builtin_memcpy(eth->src, fib->smac, 6);
	return true;
}

int lb_xdp_from_outside(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct eth_header *eth = data;
	struct bpf_fib_lookup fib = {};
	struct flow *first, *second;
	struct work *w;
	struct packet p = {};
	struct ends to;
	__u32 now;

	if ((void *)(eth + 1) > data_end ||
	    !packet_parse(data, data_end, data_end - data, sizeof(*eth), eth->proto, &p))
		return XDP_PASS;
	if (p.icmp_error || p.tunnel || p.fragment ||
	    (p.tuple.proto != LB_IPPROTO_TCP && p.tuple.proto != LB_IPPROTO_UDP))
		return XDP_PASS;
	p.tuple.stage = LB_STAGE_INGRESS;
	if (pair_has_no_flow(&p.tuple))
		return XDP_PASS;
	packet_forget_by(ctx->rx_queue_index >> 31, &p);
	w = work_begin();
	if (!w)
		return XDP_PASS;
	now = tick_now();
	first = flow_find(&p.tuple, now);
	if (!first)
		return XDP_PASS;
	/* It stays on this node, goes into a tunnel, or is not ours. */
	if ((first->state & LB_FLOW_TUNNEL) ||
	    (first->state & (LB_FLOW_ORIGINAL | LB_FLOW_MASQUERADED)) == LB_FLOW_ORIGINAL)
		return XDP_PASS;
	if ((first->state & LB_FLOW_ORIGINAL) && !flow_still_holds(&p, first, w))
		return XDP_PASS;
	address_copy(w->flow_key.src, p.tuple.src);
	address_copy(w->flow_key.dst, first->addr);
	w->flow_key.sport = first->sport;
	w->flow_key.dport = first->dport;
	w->flow_key.proto = p.tuple.proto;
	w->flow_key.stage = LB_STAGE_EGRESS;
	second = flow_find(&w->flow_key, now);
	if (!second)
		return XDP_PASS;
	flow_ends(&w->flow_key, second, &to);
	if (!xdp_route(ctx, &p, &to, &fib) || !xdp_rewrite(ctx, &p, &to, &fib))
		return XDP_PASS;
	flow_track(&p.tuple, first, p.tcp_flags, now, LB_COUNT_ASKED);
	flow_track(&w->flow_key, second, p.tcp_flags, now, LB_COUNT_ANSWERS);
	return XDP_TX;
}
