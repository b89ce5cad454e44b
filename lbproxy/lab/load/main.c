/* SPDX-License-Identifier: Apache-2.0
 *
 * Options, signals and the choice of mode.
 */
#include <getopt.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "load.h"

#define MAX_FILES 262144

volatile sig_atomic_t stopping;

static const char usage[] =
	"load serve --name NAME --port P [--port P ...] [--bind ADDRESS] [--cpu N]\n"
	"load MODE --to ADDRESS --port P [--seconds S] [--count N] [--cpu N] [--connections N]\n"
	"          [--timeout-ms N] [--pause-us N] [--progress] [--interval-ms N]\n"
	"MODE: short        connect, ask, close (TCP)\n"
	"      storm        the same, without end unless told\n"
	"      established  ask on one connection\n"
	"      hold         ask on --connections connections in turn, without end unless told\n"
	"      udp-new      a new socket for each question\n"
	"      udp-established  ask on one socket\n"
	"      bulk         send on one connection, without end unless told in --seconds (TCP)\n";

static const char *const client_modes[] = {
	"short", "storm", "established", "hold", "udp-new", "udp-established", "bulk",
};

uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void on_stop(int signal)
{
	(void)signal;
	stopping = 1;
}

static _Noreturn void reject(const char *what)
{
	fprintf(stderr, "load: %s\n%s", what, usage);
	exit(2);
}

static double number(const char *text, double least, double most)
{
	char *end;
	double value = strtod(text, &end);

	if (end == text || *end || !(value >= least && value <= most)) {
		fprintf(stderr, "load: '%s' is not a number from %.0f to %.0f\n", text, least,
			most);
		exit(2);
	}
	return value;
}

static void parse(struct options *options, int argc, char **argv)
{
	static const struct option known[] = {
		{"name", required_argument, NULL, 'n'},
		{"bind", required_argument, NULL, 'b'},
		{"to", required_argument, NULL, 't'},
		{"port", required_argument, NULL, 'p'},
		{"cpu", required_argument, NULL, 'c'},
		{"seconds", required_argument, NULL, 's'},
		{"count", required_argument, NULL, 'N'},
		{"connections", required_argument, NULL, 'C'},
		{"timeout-ms", required_argument, NULL, 'T'},
		{"interval-ms", required_argument, NULL, 'i'},
		{"pause-us", required_argument, NULL, 'u'},
		{"progress", no_argument, NULL, 'P'},
		{0},
	};
	int option;

	if (argc < 2)
		reject("no mode given");
	options->mode = argv[1];
	optind = 2;
	while ((option = getopt_long(argc, argv, "", known, NULL)) != -1) {
		switch (option) {
		case 'n':
			options->name = optarg;
			break;
		case 'b':
			options->bind_to = optarg;
			break;
		case 't':
			options->to = optarg;
			break;
		case 'p':
			if (options->port_count == MAX_PORTS)
				reject("too many ports");
			options->ports[options->port_count++] = number(optarg, 1, 65535);
			break;
		case 'c':
			options->cpu = number(optarg, 0, CPU_SETSIZE - 1);
			break;
		case 's':
			options->seconds = number(optarg, 0, 1e6);
			break;
		case 'N':
			options->count = number(optarg, 0, 1e15);
			break;
		case 'C':
			options->connections = number(optarg, 1, 1e6);
			break;
		case 'T':
			options->timeout_ms = number(optarg, 1, 1e6);
			break;
		case 'i':
			options->interval_ms = number(optarg, 1, 1e6);
			break;
		case 'u':
			options->pause_us = number(optarg, 0, 999999);
			break;
		case 'P':
			options->progress = true;
			break;
		default:
			reject("unknown option, or one without its value");
		}
	}
	if (optind != argc || !options->port_count)
		reject(options->port_count ? "too many arguments" : "--port is missing");
}

static bool is_client_mode(const char *mode)
{
	size_t i;

	for (i = 0; i < sizeof(client_modes) / sizeof(*client_modes); i++)
		if (!strcmp(mode, client_modes[i]))
			return true;
	return false;
}

/* Run on one processor only: results across two are too noisy to compare. */
static void pin_to(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set)) {
		perror("load: --cpu");
		exit(1);
	}
}

/* As many descriptors as one may have: root may raise the hard limit too. */
static void allow_many_files(void)
{
	struct rlimit wanted = {.rlim_cur = MAX_FILES, .rlim_max = MAX_FILES};

	if (!setrlimit(RLIMIT_NOFILE, &wanted) || getrlimit(RLIMIT_NOFILE, &wanted))
		return;
	wanted.rlim_cur = wanted.rlim_max;
	setrlimit(RLIMIT_NOFILE, &wanted);
}

int main(int argc, char **argv)
{
	struct options options = {
		.bind_to = "::",
		.cpu = -1,
		.connections = 1,
		.timeout_ms = 5000,
		.interval_ms = 200,
	};
	struct sigaction action = {.sa_handler = on_stop};

	parse(&options, argc, argv);
	allow_many_files();
	if (options.cpu >= 0)
		pin_to(options.cpu);
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGINT, &action, NULL);
	if (!strcmp(options.mode, "serve")) {
		if (!options.name || !*options.name || strlen(options.name) > NAME_LENGTH - 2)
			reject("serve needs --name, of at most 126 bytes");
		return serve(&options);
	}
	if (!is_client_mode(options.mode))
		reject("unknown mode");
	if (!options.to)
		reject("--to is missing");
	if (!strcmp(options.mode, "bulk") && options.count)
		reject("bulk takes --seconds, not --count");
	return run_client(&options);
}
