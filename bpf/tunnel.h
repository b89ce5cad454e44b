/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Packets inside packets: IPv4 in IPv4 (RFC 2003) and IPv6 in IPv6 (RFC 2473), from a
 * node to the address of the backend that is to have them. The backend's port is in
 * the outer identification or flow label, which nothing else needs: outer packets are
 * not fragmented. So the node that gets them has nothing to choose. (Segments that are
 * cut behind the sender have identifications that count up from there.)
 */
#ifndef LB_TUNNEL_H
#define LB_TUNNEL_H

#include "open.h"
#include "reject.h"
#include "rewrite.h"

#define LB_MOST_SEGMENTS 128 /* of a datagram that is none yet: UDP_MAX_SEGMENTS */
#define LB_TOO_BIG -2	     /* instead of a verdict: the packet has no room for another header */
#define LB_DECAP_IPV4 0x80   /* BPF_F_ADJ_ROOM_DECAP_L3_IPV4, Linux 6.4 */
#define LB_DECAP_IPV6 0x100

/* BCC 0.26 declares it without the flags. */
static long (*lb_redirect_neigh)(__u32 ifindex, void *params, int length,
				 __u64 flags) = (void *)152;

/* How long the longest packet is that comes of this one, once it is cut to size. */
static __always_inline __u32 longest_packet(struct __sk_buff *skb, const struct packet *p)
{
	struct tcp_header *tcp = packet_at(skb_data(skb), p->l4);

	if (!skb->gso_size)
		return p->end - p->l3;
	if (p->tuple.proto != LB_IPPROTO_TCP || (void *)(tcp + 1) > skb_end(skb))
		return p->l4 - p->l3 + sizeof(struct udp_header) + skb->gso_size;
	return p->l4 - p->l3 + (tcp->offset >> 4) * 4 + skb->gso_size;
}

/* Writes the header of a packet around one of `inner` bytes, in the room there is before it. */
static __always_inline bool outer_write(struct __sk_buff *skb, const struct packet *p,
					const struct work *w, const __be32 src[4], __u32 inner)
{
	void *l3 = packet_at(skb_data(skb), p->l2), *data_end = skb_end(skb);

	if (p->ipv4) {
		struct ipv4_header ip = {
			.version_ihl = 0x45,
			.length = bpf_htons(sizeof(ip) + inner),
			.id = w->to.dport,
			.fragment = bpf_htons(0x4000),
			.ttl = LB_HOPS,
			.proto = LB_IPPROTO_IPIP,
			.src = src[3],
			.dst = w->to.addr[3],
		};

		if (l3 + sizeof(ip) > data_end)
			return false;
		ip.checksum = ipv4_checksum(&ip);
		*(struct ipv4_header *)l3 = ip;
	} else {
		struct ipv6_header *ip = l3;

		if ((void *)(ip + 1) > data_end)
			return false;
		ip->version_flow = bpf_htonl(6u << 28 | bpf_ntohs(w->to.dport));
		ip->length = bpf_htons(inner);
		ip->next = LB_IPPROTO_IPV6;
		ip->hops = LB_HOPS;
		address_copy(ip->src, src);
		address_copy(ip->dst, w->to.addr);
	}
	return true;
}

/* Sends a packet to the node of the backend that w->to names, inside another one.
 * LB_TOO_BIG: w->mtu says how long it may be.
 */
static __always_inline int encapsulate(struct __sk_buff *skb, const struct packet *p,
				       struct work *w)
{
	__u32 outer = ip_length(p->ipv4), inner = p->end - p->l3;
	struct bpf_fib_lookup fib = {.ifindex = skb->ifindex};
	struct settings *set = settings_get();
	__be32 src[4] = {};
	__u64 flags;
	long result;

	fib.tot_len = longest_packet(skb, p) + outer;
	if (p->ipv4) {
		fib.family = LB_AF_INET;
		fib.ipv4_src = p->tuple.src[3];
		fib.ipv4_dst = w->to.addr[3];
		flags = BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_FIXED_GSO;
	} else {
		fib.family = LB_AF_INET6;
		address_copy(fib.ipv6_src, p->tuple.src);
		address_copy(fib.ipv6_dst, w->to.addr);
		flags = BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 | BPF_F_ADJ_ROOM_FIXED_GSO;
	}
	result = bpf_fib_lookup(skb, &fib, sizeof(fib), LB_FIB_SKIP_NEIGHBOUR);
	if (result == LB_FIB_TOO_BIG) {
		counter_bump(LB_COUNTER_TOO_BIG);
		w->mtu = fib.mtu_result - outer;
		return LB_TOO_BIG;
	}
	if ((result && result != LB_FIB_NO_NEIGHBOUR) || !set ||
	    !masquerade_address(set, fib.ifindex, p->ipv4, src)) {
		counter_bump(LB_COUNTER_NO_ROUTE);
		return LB_DROP;
	}
	if (bpf_skb_adjust_room(skb, outer, BPF_ADJ_ROOM_MAC, flags))
		return LB_DROP;
	if (!outer_write(skb, p, w, src, inner))
		return LB_DROP;
	return lb_redirect_neigh(fib.ifindex, NULL, 0, 0);
}

/* The backend that a tunnel's packet is for: its address and port. */
static __always_inline bool tunnel_end(struct __sk_buff *skb, const struct packet *p,
				       struct flow *to)
{
	void *data_end = skb_end(skb);
	void *l3 = packet_at(skb_data(skb), p->l3);

	address_copy(to->addr, p->tuple.dst);
	if (p->ipv4) {
		struct ipv4_header *ip = l3;

		if ((void *)(ip + 1) > data_end)
			return false;
		to->dport = ip->id;
	} else {
		struct ipv6_header *ip = l3;

		if ((void *)(ip + 1) > data_end)
			return false;
		to->dport = bpf_htons(bpf_ntohl(ip->version_flow));
	}
	return true;
}

/* Reads the packet inside; false where it is none that a flow may have. */
static __always_inline bool parse_inner(struct __sk_buff *skb, const struct packet *outer,
					struct packet *p)
{
	void *data = skb_data(skb), *data_end = skb_end(skb);

	p->l2 = outer->l2;
	p->l3 = outer->l4;
	p->end = outer->end;
	p->ipv4 = outer->ipv4;
	p->tuple.stage = LB_STAGE_INGRESS;
	if (!(p->ipv4 ? parse_ipv4(data, data_end, p) : parse_ipv6(data, data_end, p)))
		return false;
	packet_forget(skb, p);
	return p->end <= outer->end && p->l4 <= p->end && parse_l4(data, data_end, p, false) &&
	       !p->tunnel;
}

/* The end that what another node has sent may reach, NULL where there is none: else anyone who
 * can send such a packet would reach any port here, in anyone's name.
 */
static __always_inline struct tunnel_end *tunnel_end_open(const struct work *w)
{
	struct tunnel_end_key key = {
		.service = w->fe.service,
		.port = w->to.dport,
		.proto = w->flow_key.proto,
	};

	address_copy(key.addr, w->to.addr);
	return tunnel_ends.lookup(&key);
}

/* Copies the DSR frontend that a flow was dialled at, here or at another node. */
static __always_inline bool tunnelled_frontend(const struct flow_key *tuple, bool ipv4,
					       struct work *w)
{
	address_copy(w->key.addr, tuple->dst);
	w->key.port = tuple->dport;
	w->key.proto = tuple->proto;
	w->key.scope = LB_SCOPE_ADDRESS;
	if (!frontend_read(&w->key, &w->fe) && !node_port_read(ipv4, &w->key, &w->fe))
		return false;
	return w->fe.flags & LB_FRONTEND_DSR;
}

static __always_inline bool decapsulate(struct __sk_buff *skb, struct packet *p)
{
	__u32 outer = p->l3 - p->l2;

	if (bpf_skb_adjust_room(skb, -(__s32)outer, BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO |
					(p->ipv4 ? LB_DECAP_IPV4 : LB_DECAP_IPV6)))
		return false;
	p->l3 -= outer;
	p->l4 -= outer;
	p->end -= outer;
	return true;
}

/* Keeps the rows of a flow whose packets another node sends here: w->to and its answer. Only this
 * node sees both directions, so how a connection fares is counted here.
 */
static __always_inline bool open_tunnelled(struct packet *p, const struct tunnel_end *end,
					   struct work *w, __u32 now)
{
	struct settings *set = settings_get();
	struct backend to = {.port = w->to.dport};

	address_copy(to.addr, w->to.addr);
	if (!set || !open_reply(p, set, &to, w, now))
		return false;
	w->to.backend = p->tuple.proto == LB_IPPROTO_TCP ? end->backend | LB_HEALTH_ELSEWHERE : 0;
	flow_set_service(&w->to, w->fe.service);
	w->to.seen = now;
	w->to.state = LB_FLOW_ORIGINAL;
	return flow_put(&p->tuple, &w->to);
}

#endif
