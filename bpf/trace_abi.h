/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * What crosses between the observers of `lbproxy trace` (trace.c) and the command.
 * Apart from abi.h: another way of looking is no other datapath. Same grammar.
 */
#ifndef LB_TRACE_ABI_H
#define LB_TRACE_ABI_H

#include "abi.h"

/* trace_event.kind */
#define LB_TRACE_CONNECT 1     /* connect() has been decided about */
#define LB_TRACE_SENDMSG 2     /* the first datagram of an unconnected socket to this address */
#define LB_TRACE_SYN 3	       /* TCP is about to send its SYN, and has chosen its source */
#define LB_TRACE_ESTABLISHED 4 /* the handshake is done */
#define LB_TRACE_TIMEOUT 5     /* nobody acknowledged: sent again, or given up where `last` */
#define LB_TRACE_STATE 6       /* TCP closes, or failed to connect */
#define LB_TRACE_RELEASE 7     /* the application has closed the socket */
#define LB_TRACE_BEFORE 8      /* a packet, before lbproxy's program sees it */
#define LB_TRACE_AFTER 9       /* that packet, as lbproxy's program has passed it on */

/* trace_event.shape: where the addresses of a packet were found. */
#define LB_TRACE_PLAIN 0
#define LB_TRACE_TUNNELLED 1 /* inside another packet, which goes to `outer` */
#define LB_TRACE_QUOTED 2    /* in an ICMP error, which goes to `outer` */

/* trace_filter.flags */
#define LB_TRACE_FROM 0x1 /* only what from_addr sends, and sockets in trace_netns */
#define LB_TRACE_TO 0x2
#define LB_TRACE_SERVICE 0x4	  /* only services in trace_services */
#define LB_TRACE_EVERY_PACKET 0x8 /* else first ones, and those that begin or end something */

/* Ids of flows that began with a packet; those of sockets are cookies, which never get there. */
#define LB_TRACE_PACKET_ID 0x8000000000000000

#define LB_TRACE_NO_SERVICE 0xffffffff

/* Rows of the observers' own maps. */
#define LB_TRACE_FLOW_ROWS 4096
#define LB_TRACE_SOCKET_ROWS 4096
#define LB_TRACE_SERVICE_ROWS 256
#define LB_TRACE_NETNS_ROWS 256
#define LB_TRACE_RING_PAGES 64

struct trace_filter {
	__be32 from_addr[4];
	__be32 to_addr[4];
	__be16 to_port; /* 0: any */
	__u8 to_proto;	/* 0: any */
	__u8 pad;
	__u32 flags;
	__u32 rate; /* events a second that a CPU may tell of */
	__u32 pad2;
};

/* A socket that is followed, by cookie. */
struct trace_socket {
	__be32 dialled[4];
	__be32 chosen[4];
	__be16 dialled_port;
	__be16 chosen_port;
	__u32 pad;
};

/* A packet's addresses. */
struct trace_tuple {
	__be32 src[4];
	__be32 dst[4];
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 pad[3];
};

/* What is followed: `seen` has a bit for each stage at which a packet like it was told of. */
struct trace_flow {
	__u64 id;
	__u32 seen;
	__u32 pad;
};

/* What one CPU knows. `armed` are the events of packets that lbproxy's program has now. */
struct trace_cpu {
	__u64 second; /* that `count` is of */
	__u64 lost;
	__u64 armed_ingress;
	__u64 armed_egress;
	__u32 count;
	__u32 sequence;
};

struct trace_event {
	__u64 time_ns;
	__u64 id;
	__u64 netns;
	__u64 sent_bytes;
	__u64 received_bytes;
	__be32 src[4];
	__be32 dst[4];
	__be32 outer[4]; /* of sockets: what was dialled */
	__be16 sport;
	__be16 dport;
	__be16 outer_port;
	__u8 proto;
	__u8 kind;
	__u32 pid;
	__u32 error; /* errno of connect() or sendmsg(), where a program refused it */
	__u32 service;
	__u32 ifindex;
	__u32 cpu;
	__u32 sequence; /* the same before and after */
	__u32 length;	/* of the packet in bytes */
	__u32 srtt_us;	/* 8 times the smoothed round trip time */
	__u32 tries;	/* of SYNs that went unanswered; with a state, segments that came in */
	__u8 last;
	__u8 tcp_flags;
	__u8 old_state;
	__u8 new_state;
	__u8 stage;
	__u8 shape;
	__u8 icmp_type; /* of an ICMP error */
	__u8 pad[5];
	__u8 name[16]; /* of the process */
};

#endif
