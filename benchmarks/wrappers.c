/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Gives a packet program a fresh packet each time it is run: BPF_PROG_TEST_RUN hands
 * what one run has made of the packet to the next. A tail call does not come back, so
 * the packet is restored before it, headers and all, with the next flow's addresses in
 * it. What that costs is measured by itself, with a program behind it that returns at
 * once.
 *
 * Each type of program needs a wrapper and a table of its own. LB_BENCH_* are paths of pins.
 */
#include <uapi/linux/bpf.h>

#define LB_BENCH_DROP 2
#define LB_BENCH_NEXT -1
#define LB_BENCH_WORDS 10      /* of 8 bytes: Ethernet, IPv6 and TCP headers fit in */
#define LB_BENCH_PORTS_BITS 14 /* ports of a client, then comes the next address */

struct recipe {
	__u64 head[LB_BENCH_WORDS];
	__u32 length;	  /* of the packet */
	__u32 mask;	  /* flows - 1, of a power of two */
	__u32 address_at; /* offset of the last word of an address that flows differ in */
	__u32 address;	  /* the first flow's, in the machine's byte order */
	__u32 also_at;	  /* another such address */
	__u32 also;
	__u32 port_at;
	__u32 port;
	__u32 next; /* number of the next packet */
};

BPF_TABLE_PINNED("array", __u32, struct recipe, recipes, 1, LB_BENCH_recipes);
BPF_TABLE_PINNED("prog", __u32, __u32, to_tc, 1, LB_BENCH_to_tc);
BPF_TABLE_PINNED("prog", __u32, __u32, to_xdp, 1, LB_BENCH_to_xdp);

static __always_inline struct recipe *recipe_get(void)
{
	__u32 first = 0;

	return recipes.lookup(&first);
}

/* A pointer into the packet, in one register and with a bound, as the verifier wants it. */
static __always_inline void *place_at(void *data, __u64 at)
{
	void *place;

	asm volatile("" : "+r"(at));
	at &= 0x3f;
	place = data + at;
	asm volatile("" : "+r"(place));
	return place;
}

static __always_inline void write_head(void *data, void *data_end, struct recipe *recipe)
{
	__be32 *address = place_at(data, recipe->address_at);
	__be32 *also = place_at(data, recipe->also_at);
	__be16 *port = place_at(data, recipe->port_at);
	__u32 flow;

	if (data + sizeof(recipe->head) > data_end || (void *)(address + 1) > data_end ||
	    (void *)(also + 1) > data_end || (void *)(port + 1) > data_end)
		return;
#pragma unroll
	for (int i = 0; i < LB_BENCH_WORDS; i++)
		((__u64 *)data)[i] = recipe->head[i];
	/* An odd factor: each flow has its turn, but not in the order that they were made in. */
	flow = (recipe->next * 0x9e3779b1) & recipe->mask;
	recipe->next++;
	*address = bpf_htonl(recipe->address + (flow >> LB_BENCH_PORTS_BITS));
	*also = bpf_htonl(recipe->also + (flow >> LB_BENCH_PORTS_BITS));
	*port = bpf_htons(recipe->port + (flow & ((1 << LB_BENCH_PORTS_BITS) - 1)));
}

static __always_inline void tc_restore(struct __sk_buff *skb)
{
	struct recipe *recipe = recipe_get();

	if (!recipe)
		return;
	if (skb->len != recipe->length)
		bpf_skb_change_tail(skb, recipe->length, 0);
	write_head((void *)(long)skb->data, (void *)(long)skb->data_end, recipe);
}

int bench_tc(struct __sk_buff *skb)
{
	tc_restore(skb);
	to_tc.call(skb, 0);
	return LB_BENCH_DROP;
}

int bench_xdp(struct xdp_md *ctx)
{
	struct recipe *recipe = recipe_get();

	if (!recipe)
		return XDP_ABORTED;
	write_head((void *)(long)ctx->data, (void *)(long)ctx->data_end, recipe);
	to_xdp.call(ctx, 0);
	return XDP_ABORTED;
}

/* The floor, of each kind. */
int bench_nothing_tc(struct __sk_buff *skb)
{
	return LB_BENCH_NEXT;
}

int bench_nothing_xdp(struct xdp_md *ctx)
{
	return XDP_PASS;
}
