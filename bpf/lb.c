/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * All programs of the datapath: one text, since they share their maps, but compiled in
 * two parts, each in a process of its own, so that a start takes half the time. The
 * headers are for both.
 */
#include "icmp_error.h"
#include "masquerade.h"
#include "reject.h"
#include "select.h"
#include "socket_client.h"
#include "socket_record.h"
#include "tc.h"
#include "tunnel.h"

#if LB_PART != 2
#include "sock_health.c"
#include "sock_lb.c"
#include "tc_lb.c"
#include "xdp_lb.c"
#endif

#if LB_PART != 1
#include "tc_rare.c"
#endif
