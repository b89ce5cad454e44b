/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Every layout and constant that crosses between the kernel programs and the
 * agent. This file is the only place where they are written down: lbproxy/abi.py
 * reads it at import, and the loader compiles a static assertion for each field
 * offset that Python derived, so the two can not drift apart.
 *
 * Grammar that abi.py understands, so keep to it: `#define LB_NAME number`, and
 * structs of fixed-width integers and arrays of them, one field a line, with no
 * implicit padding. An array of __be32 or __u8 is bytes to Python.
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d, so that one
 * key and one lookup serve both families. Ports are in network order.
 */
#ifndef LB_ABI_H
#define LB_ABI_H

/* Bumped when the meaning of a row changes in a way its layout does not show, such as which bit is
 * of which addresses (absence.h): the rows of the version before would be taken over as they are.
 */
#define LB_ABI_VERSION 5

/* frontend_key.scope: where a frontend listens, and whom its row is for. */
#define LB_SCOPE_ADDRESS 0   /* the address in the key */
#define LB_SCOPE_NODE_PORT 1 /* any node address; the key has its family's zero address */
/* Added to one of these: what clients outside the cluster draw from where that is
 * something else (externalTrafficPolicy: Local). Pods and the node itself draw from
 * the row without it, which says LB_FRONTEND_EXTERNAL_LOCAL.
 */
#define LB_SCOPE_OUTSIDE 2

/* frontend.kind: which field of the Service it comes from. */
#define LB_KIND_CLUSTER_IP 1
#define LB_KIND_NODE_PORT 2
#define LB_KIND_EXTERNAL_IP 3
#define LB_KIND_LOAD_BALANCER 4

/* frontend.flags */
#define LB_FRONTEND_MAGLEV 0x1	       /* slots are a Maglev table: index it by hash */
#define LB_FRONTEND_DROP 0x2	       /* backends exist, none this policy may use: drop */
#define LB_FRONTEND_EXTERNAL_LOCAL 0x4 /* clients outside have a row of LB_SCOPE_OUTSIDE */
#define LB_FRONTEND_SOURCE_RANGES 0x8  /* only for sources that source_ranges names */
#define LB_FRONTEND_DSR 0x10	       /* remote backends answer the client themselves */
#define LB_FRONTEND_LEAST_CONN 0x20    /* of two slots the backend with less open */

/* backend.sets and frontend.sets: the sets a backend is usable in, and the one
 * a frontend draws from. A remembered backend is used again only while
 * backend.sets & frontend.sets.
 */
#define LB_SET_CLUSTER 0x1
#define LB_SET_LOCAL 0x2
#define LB_SET_HERE 0x4	   /* on this node, usable or not; no frontend draws from it */
#define LB_SET_COUNTED 0x8 /* what it has open is counted; nor from this one */
/* Why it is not in the Cluster set, or has no weight in one; no program asks. */
#define LB_SET_NOT_HINTED 0x10
#define LB_SET_ZONE_KEEPS 0x20
#define LB_SET_NO_WEIGHT 0x40

/* backend.state. Only ACTIVE and TERMINATING backends stand in slots, or keep the
 * flows of unconnected sockets that are already theirs.
 */
#define LB_BACKEND_FREE 0
#define LB_BACKEND_ACTIVE 1	 /* ready */
#define LB_BACKEND_TERMINATING 2 /* serving and terminating */
#define LB_BACKEND_UNREADY 3	 /* known, not to be used */
#define LB_BACKEND_DRAINING 4	 /* gone from the API; no new flow may use it */
#define LB_BACKEND_SERVING 5	 /* not ready, not terminating, yet serving: keeps its flows */

/* backend.health: who speaks against a backend, whatever its state; 0: nobody. It then is
 * in no set that has a healthy one, and keeps the flows that it has.
 */
#define LB_HEALTH_PROBE_FAILED 0x1
#define LB_HEALTH_EJECTED 0x2 /* its connections failed more than others' */

/* node_address.flags */
#define LB_NODE_ADDRESS_NODE_PORTS 0x1 /* NodePorts are served on it */

/* settings.flags */
#define LB_SETTING_LOCALHOST_NODE_PORTS 0x1 /* serve NodePorts on 127.0.0.0/8 */
#define LB_SETTING_MASQUERADE_ALL 0x2	    /* every flow to a ClusterIP */
#define LB_SETTING_PODS_BY_IPV4 0x4	    /* pods4_addr and pods4_mask tell pods */
#define LB_SETTING_PODS_BY_IPV6 0x8	    /* pods6_addr and pods6_mask tell pods */
#define LB_SETTING_PODS_BY_DEVICE 0x10	    /* LB_DEVICE_PODS tells pods */
#define LB_SETTING_KEEP_CLIENT 0x20	    /* no masquerade towards pods of this node */

#define LB_STRANGERS_FACTOR 0x9e3779b1
#define LB_STRANGERS_SHIFT 22

/* Rows of `no_flows` and `no_frontends`, of 64 bits each. A set bit says that there is none: so a
 * table of zeros says nothing, and it is looked up. Which bit: absence.h.
 */
#define LB_NO_FLOWS_ROWS 2048
#define LB_NO_FLOWS_SHIFT 47	       /* leaves the 17 bits that number theirs */
#define LB_NO_FRONTENDS_ADDRESSES 4096 /* of so many rows, each bit is of some addresses */
#define LB_NO_FRONTENDS_ROWS 5120      /* in those behind, of a NodePort each */
#define LB_NO_FRONTENDS_SHIFT 52       /* leaves the 12 bits that number an address's row */
#define LB_ABSENCE_FACTOR_0 0x9e3779b97f4a7c15
#define LB_ABSENCE_FACTOR_1 0xc2b2ae3d27d4eb4f
#define LB_ABSENCE_FACTOR_2 0x165667b19e3779f9
#define LB_ABSENCE_FACTOR_3 0xd6e8feb86659fd93

/* device.flags */
#define LB_DEVICE_PODS 0x1 /* what comes in here comes from a pod, to interface detectors */
#define LB_DEVICE_BARE 0x2 /* its packets have no Ethernet header */

/* flow_key.stage: where a packet is seen with these addresses. Destinations are
 * rewritten where it comes in and sources where it goes out, as netfilter does it:
 * so the kernel routes and filters it in between, from the client to the backend.
 */
#define LB_STAGE_INGRESS 0
#define LB_STAGE_EGRESS 1

/* flow.state */
#define LB_FLOW_ORIGINAL 0x1 /* this row is of the direction that began the flow */
#define LB_FLOW_REPLIED 0x2  /* packets of the other direction were seen */
#define LB_FLOW_ASSURED 0x4  /* the client has answered a reply: not a forged source */
#define LB_FLOW_FIN 0x8	     /* this direction has been closed */
#define LB_FLOW_PEER_FIN 0x10
#define LB_FLOW_RESET 0x20
#define LB_FLOW_TUNNEL 0x40	 /* goes to the backend's node as it is, which answers the client */
#define LB_FLOW_MASQUERADED 0x80 /* what the client sends leaves as this node's */
/* Both of these, which no flow of ours has: it is somebody else's, as kube-proxy's that began it.
 * Its rows lead to themselves: its packets pass as they are, for the kernel's own tracker.
 */
#define LB_FLOW_HELD 0xc0
/* Ticks by which a held flow of UDP is over before the kernel's tracker says so: the
 * other way round, nobody would know its packets.
 */
#define LB_HELD_EARLIER 2

/* When a SYN came, in flow.backend: the monotonic clock in ns, shifted, but for the lowest bit,
 * which says that it went unanswered before, and counts so already. 0: not known.
 */
#define LB_SYN_SHIFT 10
#define LB_SYN_UNANSWERED 0x1

/* Times in flows and fragments are in ticks: the coarse monotonic clock in ns,
 * shifted; a tick is about a second.
 */
#define LB_TICK_SHIFT 30

/* Rows of `handover`, each with one writer. */
#define LB_HANDOVER_LEARN 0    /* LB_LEARN_*: flows that begin now are held */
#define LB_HANDOVER_HELD_UDP 1 /* not 0: flows of UDP are held, maybe some of sockets here */
#define LB_HANDOVER_RETURN 2   /* not 0: no flow is begun any more; those there are go on */
#define LB_HANDOVER_MOVING 3   /* LB_MOVING_*: asked by programs that move flows only */
#define LB_HANDOVER_ROWS 4

/* LB_HANDOVER_LEARN */
#define LB_LEARN_PACKETS 0x1
#define LB_LEARN_SOCKETS 0x2 /* what unconnected sockets send, too */

/* LB_HANDOVER_MOVING: where flows begin. */
#define LB_MOVING_BEFORE 1 /* in `flows_before`, which is all that earlier programs know */
#define LB_MOVING_HERE 2   /* in `flows`: there are no earlier programs any more */

/* socket_spill_key.kind */
#define LB_SPILL_PEER 1	   /* connected socket; address and port are zero */
#define LB_SPILL_FORWARD 2 /* unconnected: by frontend address */
#define LB_SPILL_REVERSE 3 /* unconnected: by backend address */

/* Stands in the code for the offset of sk_err in struct sock, which is another one in each
 * kernel: the loader puts it in its place.
 */
#define LB_SK_ERR 32343

/* Likewise, for numbers that come from the tables which a program is loaded on: the code is the
 * same whatever their sizes, and what is never run the verifier does not follow.
 */
#define LB_MOVING 0x6c620001	     /* 1: `flows_before` is another table than `flows`; else 0 */
#define LB_MOST_UNASSURED 0x6c620002 /* rows of `flows` that a SYN flood may occupy */

/* counters: one row a reason, in the `counters` map. */
#define LB_COUNTER_REFUSED 0	     /* connects refused for want of a usable backend */
#define LB_COUNTER_DROPPED 1	     /* connects left to time out: none in the policy's set */
#define LB_COUNTER_BAD_SLOT 2	     /* a slot without a live backend: must stay 0 */
#define LB_COUNTER_SPILLED 3	     /* socket records that went to the spill map */
#define LB_COUNTER_SPILL_FAILED 4    /* socket records that could not be kept */
#define LB_COUNTER_AFFINITY_FAILED 5 /* affinity rows that could not be kept */
#define LB_COUNTER_UNSTEADY 6	     /* frontend rows that changed at each of four looks */
#define LB_COUNTER_SOURCE_DENIED 7   /* flows from outside the source ranges: dropped */
#define LB_COUNTER_PORTS_EXHAUSTED 8 /* flows dropped for want of a port to masquerade with */
#define LB_COUNTER_FLOWS_FULL 9	     /* flows that went to flows_new, since flows is full */
#define LB_COUNTER_FLOW_FAILED 10    /* packets dropped since no flow row could be kept */
#define LB_COUNTER_FRAGMENT_LOST 11  /* fragments whose first one was not seen */
#define LB_COUNTER_TOO_BIG 12	     /* packets too big to encapsulate, answered so */
#define LB_COUNTER_BAD_TUNNEL 13     /* encapsulated packets that no backend here wants */
#define LB_COUNTER_MANGLED 14	     /* packets dropped half rewritten: must stay 0 */
#define LB_COUNTER_NO_ROUTE 15	     /* flows dropped since no route leads to the backend */
#define LB_COUNTER_HEALTH_FAILED 16  /* outcomes that could not be kept: backend_health is full */
#define LB_COUNTERS 32

#define LB_SLOTS_PER_BLOCK 16

struct frontend_key {
	__be32 addr[4];
	__be16 port;
	__u8 proto;
	__u8 scope;
};

struct frontend {
	__u32 service;	  /* service port id: affinity, counters, names */
	__u32 block;	  /* first row in `slots` */
	__u32 slot_count; /* 0: nothing usable, refuse (or drop) */
	__u32 affinity_s; /* 0: no session affinity */
	__u16 flags;
	__u8 sets;
	__u8 kind;
	__u32 pad;
};

/* One cache line of a service's slot table: backend ids. */
struct slot_block {
	__u32 backend[16];
};

struct backend {
	__be32 addr[4];
	__be16 port;
	__u8 proto;
	__u8 state;
	__u32 service;
	__u32 locality; /* row in `localities`, 0 for none */
	__u16 weight;
	__u8 sets;
	__u8 health;
};

struct backend_stats {
	__u64 connections;
};

/* What a backend with LB_SET_COUNTED has open is opened - closed + its row in
 * load_corrections, modulo 2^32. Programs write this, the agent the correction.
 */
struct backend_load {
	__u32 opened; /* sockets and flows that began */
	__u32 closed; /* and that were seen to end */
};

/* What became of TCP connections to a backend, by its id: of this node's sockets. With the highest
 * bit: of clients whose packets come in, be they from elsewhere or from sockets that no hook sees.
 * Counts wrap.
 */
#define LB_HEALTH_ELSEWHERE 0x80000000

struct backend_health {
	__u64 handshake_us; /* the sum of what those that were answered took */
	__u32 established;
	__u32 refused;
	__u32 unanswered; /* no answer to the first SYN for a second, or no way there */
	__u32 resets;	  /* open ones that the backend has reset */
	__u32 lost;	  /* open ones of sockets, given up: nothing was acknowledged any more */
	__u32 srtt_us;	  /* of late */
};

struct service_stats {
	__u64 connections;
	__u64 refused;
};

struct service_meta {
	__u8 namespace[64];
	__u8 name[64];
	__u8 port_name[64];
	__u32 affinity_s;
	__u8 proto;
	__u8 algorithm; /* 1: Maglev, 2: least connections */
	__u8 family;	/* 4 or 6 */
	__u8 policies;	/* LB_POLICY_* */
};

#define LB_POLICY_INTERNAL_LOCAL 0x1
#define LB_POLICY_EXTERNAL_LOCAL 0x2

struct locality {
	__u8 node[256];
	__u8 zone[64];
};

struct node_address_key {
	__be32 addr[4];
};

struct node_address {
	__u32 flags;
};

struct settings {
	__u64 host_netns; /* netns cookie of the node's own namespace */
	__u32 flags;
	__u16 ports_first; /* the ports to masquerade with: from here */
	__u16 ports_count; /* so many; 0 for none */
	/* 1,024 bits, the lowest of a byte first: set where no address of this node falls by
	 * its last word times LB_STRANGERS_FACTOR, of which the upper 10 of 32 bits count.
	 */
	__u8 strangers[128];
	__be32 pods4_addr[4];
	__be32 pods4_mask[4];
	__be32 pods6_addr[4];
	__be32 pods6_mask[4];
	__be32 node4_addr[4]; /* masquerade address where the device has none; zero: none */
	__be32 node6_addr[4];
	__u32 tcp_new_ticks; /* how long a flow may be idle: not assured */
	__u32 tcp_established_ticks;
	__u32 tcp_half_closed_ticks; /* one FIN seen */
	__u32 tcp_closed_ticks;	     /* both, or a RST */
	__u32 udp_new_ticks;
	__u32 udp_stream_ticks;
	__u32 sctp_new_ticks;
	__u32 sctp_established_ticks;
};

/* A device of the node: whom flows that leave through it are masqueraded as. */
struct device {
	__be32 addr4[4]; /* its primary address; zero: none */
	__be32 addr6[4];
	__u32 flags;
};

/* Sources that may use a frontend with LB_FRONTEND_SOURCE_RANGES. */
struct source_range_key {
	__u32 prefix_bits; /* 32 for the service, and those of the address */
	__be32 service;	   /* in network order: the trie compares from the first bit on */
	__be32 addr[4];
};

struct source_range {
	__u32 allowed;
};

/* The source address of sockets in a network namespace, by cookie. */
struct netns_key {
	__u64 cookie;
	__u32 family; /* 4 or 6 */
	__u32 pad;
};

struct netns_address {
	__be32 addr[4];
};

/* A packet as it is seen at a stage. */
struct flow_key {
	__be32 src[4];
	__be32 dst[4];
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 stage;
	__u8 pad[2];
};

/* What that packet is turned into: where it comes in it gets another destination, where it
 * leaves another source, and ports. Each flow has a row for each direction, whose partner is at
 * the other stage, under the reversed addresses that this row leads to; a masqueraded flow has
 * two such pairs, one for each end. Key and row and what the kernel adds are two cache lines.
 */
struct flow {
	__be32 addr[4];
	__be16 sport;
	__be16 dport;
	/* Of what the client sends, where that comes in: which must serve for the row to hold, if
	 * UDP. With LB_HEALTH_ELSEWHERE of a TCP connection that another node has sent here, by
	 * DSR: how it fares is counted, and it is none of the load that this node has chosen. Of
	 * answers, where they leave: when the flow or its latest SYN came (LB_SYN_*). 0 in others.
	 */
	__u32 backend;
	__u32 seen;	 /* tick of the last packet, either direction */
	__u8 service[3]; /* lowest byte first */
	__u8 state;
};

/* Between some addresses, at one stage: no flow has a row. Only the agent writes `none`, as it
 * has found; `begun` the programs, before they write a row.
 */
struct no_flows {
	__u64 none;
	__u64 begun;
};

/* To some addresses, or to a NodePort: no frontend. */
struct no_frontends {
	__u64 none;
};

/* The ports of a datagram, for its fragments after the first. */
struct fragment_key {
	__be32 src[4];
	__be32 dst[4];
	__u32 id;
	__u8 proto;
	__u8 pad[3];
};

struct fragment {
	__be16 sport;
	__be16 dport;
};

/* The backends of this node that other nodes may send packets to, as they are, for a
 * service with DSR.
 */
struct tunnel_end_key {
	__u32 service;
	__be32 addr[4];
	__be16 port;
	__u8 proto;
	__u8 pad;
};

struct tunnel_end {
	__u32 backend; /* its id */
};

/* The slots that a frontend with LB_FRONTEND_DSR drew from before its last change. */
struct earlier_key {
	__u32 service;
	__u32 set;
};

struct earlier {
	__u32 block;
	__u32 slot_count;
};

/* What a socket was translated to. Lives from connect or first sendmsg until
 * the socket is released, in the row cookie & (rows - 1); in the spill map
 * while that row belongs to another live socket.
 */
struct socket_record {
	__u64 cookie; /* 0: free. Written last, by compare-and-exchange */
	__be32 frontend_addr[4];
	__be32 backend_addr[4];
	__be16 frontend_port;
	__be16 backend_port;
	__u32 backend;
	__u32 spilled; /* some socket of this row went to the spill map */
	/* The SYN's timeout is counted. Only lb_sock_health reads it: padding to others. */
	__u32 pad_unanswered;
	__u32 pad[2]; /* one cache line */
};

struct socket_spill_key {
	__u64 cookie;
	__be32 addr[4];
	__be16 port;
	__u8 kind;
	__u8 pad;
	__u32 pad2;
};

struct affinity_key {
	__be32 client[4]; /* an address, or a netns cookie in the first 8 bytes */
	__u32 service;
	__u32 client_is_netns;
};

struct affinity {
	__u32 backend;
	__u32 started_s; /* coarse monotonic clock, when it last began a flow */
};

/* What one run of a packet program works with, and no other looks at: BPF's stack is
 * too small for it. Its fields are the programs' own (bpf/scratch.h).
 */
struct scratch {
	__u64 words[32];
};

#endif
