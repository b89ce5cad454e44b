/* SPDX-License-Identifier: Apache-2.0
 *
 * The client that sends: one connection, as fast as it takes them, and in the end
 * the server's word for how much of it arrived. Nothing else counts as delivered:
 * what a socket accepts may be in a buffer yet.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "load.h"

/* Send until the time is over or a stop: how much the socket took, or minus the errno. */
static int64_t pour(int fd, const struct options *options, const struct target *target,
		    uint64_t started_ns)
{
	static const char chunk[BULK_CHUNK] = {BULK_MARK};
	uint64_t until_ns = options->seconds > 0 ? started_ns + options->seconds * 1e9 : UINT64_MAX;
	uint64_t moved_ns = started_ns;
	uint64_t now = started_ns;
	int64_t sent = 0;
	ssize_t length;

	do {
		length = send(fd, chunk, sizeof(chunk), MSG_NOSIGNAL);
		if (length < 0 && errno != EINTR)
			return -errno;
		now = now_ns();
		if (length > 0) {
			sent += length;
			moved_ns = now;
		} else if (now - moved_ns > target->timeout_ns) {
			return -ETIMEDOUT;
		}
	} while (now < until_ns && !stopping);
	return sent ? sent : -EINTR;
}

/* One line, its newline replaced by a zero: its length, or minus the errno. A stop
 * does not cut it short: it is what the stop is to end with.
 */
static int read_line(int fd, char *line, int size, uint64_t deadline_ns)
{
	int filled = 0;
	ssize_t length;

	for (;;) {
		length = recv(fd, line + filled, size - filled, 0);
		if (!length)
			return -ECONNRESET;
		if (length < 0 && errno != EINTR)
			return -errno;
		if (length > 0)
			filled += length;
		if (filled && line[filled - 1] == '\n') {
			line[filled - 1] = '\0';
			return filled - 1;
		}
		if (filled == size)
			return -EPROTO;
		if (length < 0 && now_ns() > deadline_ns)
			return -ETIMEDOUT;
	}
}

/* Send, then ask what arrived: the length of the server's name, or minus the errno. */
static int deliver(struct report *report, const struct options *options,
		   const struct target *target, int fd, char *name)
{
	char line[TOTAL_LENGTH];
	int64_t sent = pour(fd, options, target, report->started_ns);
	uint64_t arrived;
	int length;
	char *rest;

	if (sent < 0)
		return sent;
	if (shutdown(fd, SHUT_WR))
		return -errno;
	length = read_line(fd, line, sizeof(line), now_ns() + target->timeout_ns);
	if (length < 0)
		return length;
	arrived = strtoull(line, &rest, 10);
	if (rest == line || *rest != ' ' || arrived != (uint64_t)sent)
		return -EPROTO;
	report->bytes = arrived;
	length = strnlen(rest + 1, NAME_LENGTH);
	memcpy(name, rest + 1, length);
	return length;
}

void run_bulk(struct report *report, const struct options *options, const struct target *target)
{
	char name[NAME_LENGTH];
	int outcome;
	int fd = open_connection(target, now_ns() + target->timeout_ns);

	if (fd < 0) {
		count_outcome(report, NULL, fd, 0);
		return;
	}
	report_begin(report);
	outcome = deliver(report, options, target, fd, name);
	count_outcome(report, name, outcome, now_ns() - report->started_ns);
	close(fd);
}
