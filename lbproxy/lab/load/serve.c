/* SPDX-License-Identifier: Apache-2.0
 *
 * The server: TCP and UDP on every given port, both families. It answers each
 * newline (each datagram for UDP) with its name; after a '?' with its name and
 * the client's address and port as it sees them. What begins with BULK_MARK it
 * reads to the end, and answers once.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <unistd.h>

#include "load.h"

#define EVENTS 128
#define REQUEST_LENGTH 4096
#define ANSWER_LENGTH (NAME_LENGTH + INET6_ADDRSTRLEN + 16)

enum kind { LISTENER, DATAGRAMS, CONNECTION };

/* By what a connection sent so far: nothing, a '?' last, anything else, BULK_MARK first. */
enum state { NEW, ASKED_ADDRESS, ASKED, BULK };

struct connection {
	enum state state;
	uint64_t bulk_bytes;
};

struct server {
	int epoll;
	const char *name;
	char plain[NAME_LENGTH + 2]; /* the name and a newline */
	int plain_length;
	struct connection *connections; /* by descriptor */
	rlim_t descriptors;
	uint64_t accepted;
	uint64_t tcp_answers;
	uint64_t udp_answers;
	uint64_t bulk_bytes;
};

static int watch(struct server *server, int fd, enum kind kind)
{
	struct epoll_event event = {
		.events = EPOLLIN,
		.data.u64 = (uint64_t)kind << 32 | (uint32_t)fd,
	};

	return epoll_ctl(server->epoll, EPOLL_CTL_ADD, fd, &event);
}

static int describe(const struct server *server, const struct sockaddr_in6 *client, char *answer)
{
	char text[INET6_ADDRSTRLEN] = "?";
	const char *shown = text;

	inet_ntop(AF_INET6, &client->sin6_addr, text, sizeof(text));
	if (IN6_IS_ADDR_V4MAPPED(&client->sin6_addr))
		shown = text + strlen("::ffff:");
	return snprintf(answer, ANSWER_LENGTH, "%s %s %d\n", server->name, shown,
			ntohs(client->sin6_port));
}

static void accept_one(struct server *server, int listener)
{
	int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

	if (fd < 0)
		return;
	if ((rlim_t)fd >= server->descriptors || watch(server, fd, CONNECTION)) {
		close(fd);
		return;
	}
	server->connections[fd] = (struct connection){0};
	server->accepted++;
}

static bool answer_stream(struct server *server, int fd, bool with_address)
{
	struct sockaddr_in6 client;
	socklen_t size = sizeof(client);
	char described[ANSWER_LENGTH];
	const char *answer = server->plain;
	int length = server->plain_length;

	if (with_address) {
		if (getpeername(fd, (struct sockaddr *)&client, &size))
			return false;
		length = describe(server, &client, described);
		answer = described;
	}
	server->tcp_answers++;
	/* A client that does not read its answers is cut off, not waited for. */
	return send(fd, answer, length, MSG_NOSIGNAL) == length;
}

static void count_bulk(struct server *server, int fd, ssize_t length)
{
	server->connections[fd].state = BULK;
	server->connections[fd].bulk_bytes += length;
	server->bulk_bytes += length;
}

/* Data is copied out as an application would have it, not discarded in the kernel. */
static void serve_bulk(struct server *server, int fd)
{
	static char data[BULK_CHUNK];
	char answer[TOTAL_LENGTH];
	ssize_t length = recv(fd, data, sizeof(data), 0);

	if (length > 0) {
		count_bulk(server, fd, length);
		return;
	}
	if (length < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (!length) {
		length = snprintf(answer, sizeof(answer), "%llu %s\n",
				  (unsigned long long)server->connections[fd].bulk_bytes,
				  server->name);
		if (send(fd, answer, length, MSG_NOSIGNAL) == length)
			server->tcp_answers++;
	}
	close(fd);
}

static void serve_stream(struct server *server, int fd)
{
	enum state *state = &server->connections[fd].state;
	char request[REQUEST_LENGTH];
	ssize_t length;
	ssize_t i;

	if (*state == BULK) {
		serve_bulk(server, fd);
		return;
	}
	length = recv(fd, request, sizeof(request), 0);
	if (length < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (length <= 0) {
		close(fd);
		return;
	}
	if (*state == NEW && request[0] == BULK_MARK) {
		count_bulk(server, fd, length);
		return;
	}
	for (i = 0; i < length; i++) {
		if (request[i] == '\n' && !answer_stream(server, fd, *state == ASKED_ADDRESS)) {
			close(fd);
			return;
		}
		*state = request[i] == '?' ? ASKED_ADDRESS : ASKED;
	}
}

/* The answer leaves from the address the question came to: a node has several. */
static void serve_datagram(struct server *server, int fd)
{
	struct sockaddr_in6 client;
	char request[REQUEST_LENGTH];
	char described[ANSWER_LENGTH];
	char control[CMSG_SPACE(sizeof(struct in6_pktinfo))] = {0};
	struct iovec part = {.iov_base = request, .iov_len = sizeof(request)};
	struct msghdr message = {
		.msg_name = &client,
		.msg_namelen = sizeof(client),
		.msg_iov = &part,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = sizeof(control),
	};
	struct cmsghdr *header;
	ssize_t length = recvmsg(fd, &message, MSG_DONTWAIT);

	if (length < 0)
		return;
	header = CMSG_FIRSTHDR(&message);
	if (header && header->cmsg_type == IPV6_PKTINFO) {
		struct in6_pktinfo *arrival = (struct in6_pktinfo *)CMSG_DATA(header);

		/* Only the address: the way back is for the routing table to say. */
		if (!IN6_IS_ADDR_LINKLOCAL(&arrival->ipi6_addr))
			arrival->ipi6_ifindex = 0;
	}
	part.iov_base = server->plain;
	part.iov_len = server->plain_length;
	if (length && request[0] == '?') {
		part.iov_len = describe(server, &client, described);
		part.iov_base = described;
	}
	if (sendmsg(fd, &message, 0) >= 0)
		server->udp_answers++;
}

static int open_port(struct server *server, const struct in6_addr *address, uint16_t port, int type)
{
	struct sockaddr_in6 here = {
		.sin6_family = AF_INET6,
		.sin6_addr = *address,
		.sin6_port = htons(port),
	};
	int fd = socket(AF_INET6, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	int yes = 1;
	int no = 0;

	if (fd < 0)
		return -1;
	if (setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof(no)))
		return -1;
	if (type == SOCK_STREAM && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes)))
		return -1;
	if (type == SOCK_DGRAM && setsockopt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &yes, sizeof(yes)))
		return -1;
	if (bind(fd, (struct sockaddr *)&here, sizeof(here)))
		return -1;
	if (type == SOCK_STREAM && listen(fd, 65535))
		return -1;
	return watch(server, fd, type == SOCK_STREAM ? LISTENER : DATAGRAMS);
}

static bool parse_bind(const char *text, struct in6_addr *address)
{
	char mapped[INET6_ADDRSTRLEN + 8];

	if (inet_pton(AF_INET6, text, address) == 1)
		return true;
	snprintf(mapped, sizeof(mapped), "::ffff:%s", text);
	return inet_pton(AF_INET6, mapped, address) == 1;
}

static int prepare(struct server *server, const struct options *options)
{
	struct rlimit files;
	struct in6_addr address;
	int i;

	if (!parse_bind(options->bind_to, &address)) {
		fprintf(stderr, "load: --bind needs an address, not '%s'\n", options->bind_to);
		return 2;
	}
	server->name = options->name;
	server->plain_length =
		snprintf(server->plain, sizeof(server->plain), "%s\n", options->name);
	if (getrlimit(RLIMIT_NOFILE, &files))
		return 1;
	server->descriptors = files.rlim_cur;
	server->connections = calloc(files.rlim_cur, sizeof(*server->connections));
	server->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (!server->connections || server->epoll < 0) {
		perror("load: epoll");
		return 1;
	}
	for (i = 0; i < options->port_count; i++) {
		if (open_port(server, &address, options->ports[i], SOCK_STREAM) ||
		    open_port(server, &address, options->ports[i], SOCK_DGRAM)) {
			fprintf(stderr, "load: port %d: %s\n", options->ports[i], strerror(errno));
			return 1;
		}
	}
	return 0;
}

int serve(const struct options *options)
{
	struct server server = {0};
	struct epoll_event events[EVENTS];
	struct cpu_time cpu_before;
	int status = prepare(&server, options);
	sigset_t stops;
	sigset_t before;
	int ready;
	int i;

	if (status)
		return status;
	/* Let a stop in only while waiting, so that none is missed just before. */
	sigemptyset(&stops);
	sigaddset(&stops, SIGTERM);
	sigaddset(&stops, SIGINT);
	sigprocmask(SIG_BLOCK, &stops, &before);
	printf("{\"ready\":true}\n");
	fflush(stdout);
	cpu_before = cpu_now();
	while (!stopping) {
		ready = epoll_pwait(server.epoll, events, EVENTS, -1, &before);
		for (i = 0; i < ready; i++) {
			int fd = (int)(uint32_t)events[i].data.u64;

			switch ((enum kind)(events[i].data.u64 >> 32)) {
			case LISTENER:
				accept_one(&server, fd);
				break;
			case DATAGRAMS:
				serve_datagram(&server, fd);
				break;
			case CONNECTION:
				serve_stream(&server, fd);
				break;
			}
		}
	}
	printf("{\"mode\":\"serve\",\"accepted\":%llu,\"tcp\":%llu,\"udp\":%llu,\"bytes\":%llu,",
	       (unsigned long long)server.accepted, (unsigned long long)server.tcp_answers,
	       (unsigned long long)server.udp_answers, (unsigned long long)server.bulk_bytes);
	print_cpu_since(&cpu_before);
	printf("}\n");
	return 0;
}
