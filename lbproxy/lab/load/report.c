/* SPDX-License-Identifier: Apache-2.0
 *
 * What the clients saw, as JSON: counts by server and by error, latency
 * percentiles from a histogram with 32 buckets to each power of two.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "load.h"

#define SUB_BITS 5
#define SUB (1 << SUB_BITS)
#define BUCKETS (64 * SUB)
#define INDEX_SIZE 4096

static char names[MAX_SERVERS][NAME_LENGTH];
static int name_count;
static uint16_t name_index[INDEX_SIZE]; /* by hash; number + 1, 0 is free */
static uint64_t histogram[BUCKETS];
static uint64_t longest_ns;

static int server_number(const char *name, int length)
{
	uint32_t hash = 2166136261u;
	int number;
	int i;

	if (length >= NAME_LENGTH)
		length = NAME_LENGTH - 1;
	for (i = 0; i < length; i++)
		hash = (hash ^ (unsigned char)name[i]) * 16777619u;

	for (;; hash++) {
		number = name_index[hash % INDEX_SIZE] - 1;
		if (number < 0)
			break;
		if (!strncmp(names[number], name, length) && !names[number][length])
			return number;
	}
	if (name_count == MAX_SERVERS) {
		fprintf(stderr, "load: more than %d server names\n", MAX_SERVERS);
		exit(1);
	}
	memcpy(names[name_count], name, length);
	name_index[hash % INDEX_SIZE] = ++name_count;
	return name_count - 1;
}

static int bucket_of(uint64_t ns)
{
	int shift;

	if (ns < SUB)
		return (int)ns;
	shift = 63 - __builtin_clzll(ns) - SUB_BITS;
	return (shift + 1) * SUB + (int)((ns >> shift) & (SUB - 1));
}

static uint64_t bucket_start_ns(int bucket)
{
	int shift = bucket / SUB - 1;

	if (shift < 0)
		return bucket;
	return (uint64_t)(SUB + bucket % SUB) << shift;
}

static double percentile_us(uint64_t total, double share)
{
	uint64_t wanted = (uint64_t)(share * total);
	uint64_t seen = 0;
	int i;

	for (i = 0; i < BUCKETS; i++) {
		seen += histogram[i];
		if (seen > wanted)
			return bucket_start_ns(i) / 1e3;
	}
	return longest_ns / 1e3;
}

struct cpu_time cpu_now(void)
{
	struct rusage used = {0};

	getrusage(RUSAGE_SELF, &used);
	return (struct cpu_time){
		.user_s = used.ru_utime.tv_sec + used.ru_utime.tv_usec / 1e6,
		.system_s = used.ru_stime.tv_sec + used.ru_stime.tv_usec / 1e6,
	};
}

void print_cpu_since(const struct cpu_time *before)
{
	struct cpu_time now = cpu_now();

	printf("\"cpu_s\":{\"user\":%.6f,\"system\":%.6f}", now.user_s - before->user_s,
	       now.system_s - before->system_s);
}

void report_start(struct report *report)
{
	memset(report, 0, sizeof(*report));
	report_begin(report);
	report->printed_ns = report->started_ns;
}

void report_begin(struct report *report)
{
	report->cpu_before = cpu_now();
	report->started_ns = now_ns();
}

void report_answer(struct report *report, const char *name, int length, uint64_t took_ns)
{
	int server = server_number(name, length);

	report->total.count++;
	report->total.servers[server]++;
	report->interval.count++;
	report->interval.servers[server]++;
	histogram[bucket_of(took_ns)]++;
	if (took_ns > longest_ns)
		longest_ns = took_ns;
}

void report_failure(struct report *report, int error)
{
	report->total.failed++;
	report->total.failures[error & 255]++;
	report->interval.failed++;
	report->interval.failures[error & 255]++;
}

static void print_string(const char *text)
{
	putchar('"');
	for (; *text; text++) {
		if (*text == '"' || *text == '\\')
			printf("\\%c", *text);
		else if ((unsigned char)*text < 0x20)
			printf("\\u%04x", (unsigned char)*text);
		else
			putchar(*text);
	}
	putchar('"');
}

static void print_tally(const struct tally *tally)
{
	const char *comma = "";
	int i;

	printf("\"count\":%llu,\"failed\":%llu,\"servers\":{", (unsigned long long)tally->count,
	       (unsigned long long)tally->failed);
	for (i = 0; i < name_count; i++) {
		if (!tally->servers[i])
			continue;
		printf("%s", comma);
		print_string(names[i]);
		printf(":%llu", (unsigned long long)tally->servers[i]);
		comma = ",";
	}
	printf("},\"failures\":{");
	comma = "";
	for (i = 0; i < 256; i++) {
		const char *name = strerrorname_np(i);

		if (!tally->failures[i])
			continue;
		printf("%s\"%s\":%llu", comma, name ? name : "?",
		       (unsigned long long)tally->failures[i]);
		comma = ",";
	}
	printf("}");
}

void report_progress(struct report *report, const struct options *options)
{
	uint64_t now = now_ns();

	if (!options->progress || now - report->printed_ns < options->interval_ms * 1000000ull)
		return;
	printf("{\"progress\":true,\"t_ms\":%llu,\"open\":%llu,",
	       (unsigned long long)(now - report->started_ns) / 1000000,
	       (unsigned long long)report->open_connections);
	print_tally(&report->interval);
	printf("}\n");
	fflush(stdout);
	memset(&report->interval, 0, sizeof(report->interval));
	report->printed_ns = now;
}

void report_result(const struct report *report, const struct options *options)
{
	double seconds = (now_ns() - report->started_ns) / 1e9;
	uint64_t total = report->total.count;

	printf("{\"mode\":\"%s\",\"to\":", options->mode);
	print_string(options->to);
	printf(",\"port\":%d,\"seconds\":%.6f,\"per_second\":%.1f,\"open\":%llu,",
	       options->ports[0], seconds, total / seconds,
	       (unsigned long long)report->open_connections);
	print_tally(&report->total);
	printf(",\"latency_us\":{\"p50\":%.2f,\"p90\":%.2f,\"p99\":%.2f,\"p999\":%.2f,\"max\":%.2f}"
	       ",\"bytes\":%llu,\"bytes_per_second\":%.0f,",
	       percentile_us(total, 0.5), percentile_us(total, 0.9), percentile_us(total, 0.99),
	       percentile_us(total, 0.999), longest_ns / 1e3, (unsigned long long)report->bytes,
	       report->bytes / seconds);
	print_cpu_since(&report->cpu_before);
	printf("}\n");
	fflush(stdout);
}
