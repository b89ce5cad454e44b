/* SPDX-License-Identifier: Apache-2.0
 *
 * The clients that ask (bulk.c has the one that sends). A request is one newline
 * (one datagram for UDP), the answer the server's name and a newline.
 *
 * Sockets block and carry no timeouts, so that a connection costs the system
 * calls an application would make and no more. A timer signal wakes a call that
 * hangs; whoever is woken compares the clock with its deadline.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "load.h"

#define TICK_US 20000

static void on_tick(int signal)
{
	(void)signal;
}

static int start_ticking(void)
{
	struct itimerval every = {
		.it_interval.tv_usec = TICK_US,
		.it_value.tv_usec = TICK_US,
	};
	struct sigaction action = {.sa_handler = on_tick};

	if (sigaction(SIGALRM, &action, NULL))
		return -1;
	return setitimer(ITIMER_REAL, &every, NULL);
}

static bool parse_target(struct target *target, const struct options *options, int type)
{
	struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)&target->address;
	struct sockaddr_in *in4 = (struct sockaddr_in *)&target->address;

	memset(target, 0, sizeof(*target));
	target->type = type;
	target->timeout_ns = options->timeout_ms * 1000000ull;
	if (inet_pton(AF_INET, options->to, &in4->sin_addr) == 1) {
		in4->sin_family = AF_INET;
		in4->sin_port = htons(options->ports[0]);
		target->length = sizeof(*in4);
		return true;
	}
	if (inet_pton(AF_INET6, options->to, &in6->sin6_addr) == 1) {
		in6->sin6_family = AF_INET6;
		in6->sin6_port = htons(options->ports[0]);
		target->length = sizeof(*in6);
		return true;
	}
	return false;
}

/* Wait for an interrupted connect: 0, or the errno it ended with. */
static int finish_connect(int fd, uint64_t deadline_ns)
{
	struct pollfd waiting = {.fd = fd, .events = POLLOUT};
	socklen_t length = sizeof(int);
	int error = 0;

	while (poll(&waiting, 1, TICK_US / 1000) <= 0) {
		if (stopping)
			return EINTR;
		if (now_ns() > deadline_ns)
			return ETIMEDOUT;
	}
	if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length))
		return errno;
	return error;
}

int open_connection(const struct target *target, uint64_t deadline_ns)
{
	int fd = socket(target->address.ss_family, target->type | SOCK_CLOEXEC, 0);
	int error;

	if (fd < 0)
		return -errno;
	if (!connect(fd, (const struct sockaddr *)&target->address, target->length))
		return fd;
	error = errno;
	if (error == EINTR)
		error = finish_connect(fd, deadline_ns);
	if (!error)
		return fd;
	close(fd);
	return -error;
}

/* One request and its answer: the length of the name, or minus the errno. */
static int exchange(int fd, char *name, uint64_t deadline_ns)
{
	int filled = 0;
	ssize_t length;

	while (send(fd, "\n", 1, MSG_NOSIGNAL) < 0) {
		if (errno != EINTR)
			return -errno;
		if (stopping)
			return -EINTR;
		if (now_ns() > deadline_ns)
			return -ETIMEDOUT;
	}
	for (;;) {
		length = recv(fd, name + filled, NAME_LENGTH - filled, 0);
		if (!length)
			return -ECONNRESET;
		if (length < 0 && errno != EINTR)
			return -errno;
		if (length > 0)
			filled += length;
		if (filled && name[filled - 1] == '\n')
			return filled - 1;
		if (filled == NAME_LENGTH)
			return -EPROTO;
		if (length < 0 && stopping)
			return -EINTR;
		if (length < 0 && now_ns() > deadline_ns)
			return -ETIMEDOUT;
	}
}

void count_outcome(struct report *report, const char *name, int outcome, uint64_t took_ns)
{
	if (outcome >= 0)
		report_answer(report, name, outcome, took_ns);
	else if (outcome != -EINTR || !stopping)
		report_failure(report, -outcome);
}

/* Connect, ask, close. */
static void once(struct report *report, const struct target *target)
{
	uint64_t began_ns = now_ns();
	uint64_t deadline_ns = began_ns + target->timeout_ns;
	char name[NAME_LENGTH];
	int outcome;
	int fd = open_connection(target, deadline_ns);

	if (fd < 0) {
		count_outcome(report, NULL, fd, 0);
		return;
	}
	outcome = exchange(fd, name, deadline_ns);
	close(fd);
	count_outcome(report, name, outcome, now_ns() - began_ns);
}

/* Ask on an open connection: false when it is broken. */
static bool ask(struct report *report, const struct target *target, int fd)
{
	uint64_t began_ns = now_ns();
	char name[NAME_LENGTH];
	int outcome = exchange(fd, name, began_ns + target->timeout_ns);

	count_outcome(report, name, outcome, now_ns() - began_ns);
	return outcome >= 0;
}

/* The timer signal cuts a sleep short: sleep until a point in time instead. */
static void pause_for(int us)
{
	uint64_t until_ns = now_ns() + us * 1000ull;
	struct timespec until = {
		.tv_sec = until_ns / 1000000000,
		.tv_nsec = until_ns % 1000000000,
	};

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR && !stopping)
		;
}

static bool finished(struct report *report, const struct options *options)
{
	uint64_t made = report->total.count + report->total.failed;

	report_progress(report, options);
	if (options->pause_us)
		pause_for(options->pause_us);
	if (stopping || (options->count && made >= options->count))
		return true;
	return options->seconds > 0 && now_ns() - report->started_ns >= options->seconds * 1e9;
}

static void run_new(struct report *report, const struct options *options,
		    const struct target *target)
{
	while (!finished(report, options))
		once(report, target);
}

/* Ask on the open connections in turn until the end; one that breaks is counted and not reopened.
 */
static void run_held(struct report *report, const struct options *options,
		     const struct target *target)
{
	int *fds = calloc(options->connections, sizeof(*fds));
	int open_count = 0;
	int turn = 0;
	int fd;
	int i;

	if (!fds)
		return;
	for (i = 0; i < options->connections && !stopping; i++) {
		fd = open_connection(target, now_ns() + target->timeout_ns);
		if (fd < 0)
			count_outcome(report, NULL, fd, 0);
		else
			fds[open_count++] = fd;
	}
	report->open_connections = open_count;
	report_begin(report);
	while (open_count && !finished(report, options)) {
		turn = turn + 1 < open_count ? turn + 1 : 0;
		if (ask(report, target, fds[turn]) || stopping)
			continue;
		close(fds[turn]);
		fds[turn] = fds[--open_count];
		report->open_connections = open_count;
	}
	for (i = 0; i < open_count; i++)
		close(fds[i]);
	free(fds);
}

int run_client(const struct options *options)
{
	static struct report report;
	struct target target;
	bool udp = !strncmp(options->mode, "udp-", 4);
	bool held = !strcmp(options->mode, "established") || !strcmp(options->mode, "hold") ||
		    !strcmp(options->mode, "udp-established");

	if (!parse_target(&target, options, udp ? SOCK_DGRAM : SOCK_STREAM)) {
		fprintf(stderr, "load: --to needs an IPv4 or IPv6 address, not '%s'\n",
			options->to);
		return 2;
	}
	if (start_ticking()) {
		perror("load: timer");
		return 1;
	}
	printf("{\"ready\":true}\n");
	fflush(stdout);
	report_start(&report);
	if (held)
		run_held(&report, options, &target);
	else if (!strcmp(options->mode, "bulk"))
		run_bulk(&report, options, &target);
	else
		run_new(&report, options, &target);
	report_result(&report, options);
	return 0;
}
