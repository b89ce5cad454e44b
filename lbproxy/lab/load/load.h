/* SPDX-License-Identifier: Apache-2.0
 *
 * Traffic for the lab: a server that says who it is, and clients that count who
 * answered. One JSON object a line on standard output, the first {"ready":true}
 * once it listens, or once a stop signal would be answered with a result.
 */
#ifndef LOAD_H
#define LOAD_H

#include <netinet/in.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>

#define NAME_LENGTH 128
#define MAX_PORTS 64
#define MAX_SERVERS 1024
/* A connection whose first byte is this one asks nothing: the server reads it to
 * its end and then says how many bytes it read, and its name.
 */
#define BULK_MARK '\1'
#define BULK_CHUNK (128 * 1024)
#define TOTAL_LENGTH (NAME_LENGTH + 24)

struct options {
	const char *mode;
	const char *name;
	const char *bind_to;
	const char *to;
	uint16_t ports[MAX_PORTS];
	int port_count;
	int cpu;
	double seconds;
	uint64_t count;
	int connections;
	int timeout_ms;
	int interval_ms;
	int pause_us;
	bool progress;
};

/* Set by SIGTERM and SIGINT: finish, report, exit 0. */
extern volatile sig_atomic_t stopping;

uint64_t now_ns(void);

/* What this process computed itself and what the kernel did for it. How the two
 * share it the kernel samples at its clock ticks: only the sum is exact.
 */
struct cpu_time {
	double user_s;
	double system_s;
};

struct cpu_time cpu_now(void);
void print_cpu_since(const struct cpu_time *before);

/* Counts of answers by server and of failures by errno, since the last reset. */
struct tally {
	uint64_t count;
	uint64_t failed;
	uint64_t servers[MAX_SERVERS];
	uint64_t failures[256];
};

struct report {
	uint64_t started_ns;
	uint64_t printed_ns;
	struct tally total;
	struct tally interval;
	uint64_t open_connections;
	uint64_t bytes; /* that a server says it read */
	struct cpu_time cpu_before;
};

void report_start(struct report *report);
/* Leave out of the rate and of the CPU time what was only preparation. */
void report_begin(struct report *report);
void report_answer(struct report *report, const char *name, int length, uint64_t took_ns);
void report_failure(struct report *report, int error);
void report_progress(struct report *report, const struct options *options);
void report_result(const struct report *report, const struct options *options);

struct target {
	struct sockaddr_storage address;
	socklen_t length;
	int type;
	uint64_t timeout_ns;
};

/* A connected socket, or minus the errno. */
int open_connection(const struct target *target, uint64_t deadline_ns);

/* Count an answer (the length of the server's name) or a failure (minus the errno). */
void count_outcome(struct report *report, const char *name, int outcome, uint64_t took_ns);

void run_bulk(struct report *report, const struct options *options, const struct target *target);

int serve(const struct options *options);
int run_client(const struct options *options);

#endif
