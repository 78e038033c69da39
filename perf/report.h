/* What the readers counted, as one line of JSON. */
#ifndef REPORT_H
#define REPORT_H

#include "readers.h"

static void readers_report(void) {
    int64_t lowest = INT64_MAX, highest = -1;
    for (unsigned i = 0; i < R.opened; i++) {
        if (!R.all[i].ready || R.all[i].phase != PHASE_STREAM) continue;
        if (R.all[i].version < lowest) lowest = R.all[i].version;
        if (R.all[i].version > highest) highest = R.all[i].version;
    }
    printf("{\"event\":\"report\",\"seconds\":%.6f,\"delivered_seconds\":%.6f,\"cpu_seconds\":%.6f,\"connections\":%u,\"pending\":%u,\"failed\":%u,\"closed\":%u,"
           "\"finished\":%llu,\"bytes\":%llu,\"reads\":%llu,\"deliveries\":%llu,\"snapshots\":%llu,\"others\":%llu,\"lost\":%llu,"
           "\"repeated\":%llu,\"resets\":%llu,\"errors\":%llu,\"rescans\":%llu,\"lowest_version\":%lld,\"highest_version\":%lld,\"error\":\"%s\",",
           (double)(now_ns() - R.mark_ns) / 1e9, (double)(R.delivered_ns - R.mark_ns) / 1e9, cpu_seconds() - R.mark_cpu, R.ready, R.pending, R.failed, R.closed,
           (unsigned long long)R.finished, (unsigned long long)R.bytes, (unsigned long long)R.reads, (unsigned long long)R.deliveries,
           (unsigned long long)R.snapshots, (unsigned long long)R.others, (unsigned long long)R.lost, (unsigned long long)R.repeated,
           (unsigned long long)R.resets, (unsigned long long)R.errors, (unsigned long long)R.rescans,
           (long long)(lowest == INT64_MAX ? -1 : lowest), (long long)highest, R.error_text);
    histogram_print(stdout, "latency", &R.latency);
    putchar(',');
    histogram_print(stdout, "setup", &R.setup);
    putchar(',');
    histogram_print(stdout, "first_snapshot", &R.first);
    puts("}");
}

/* The newest update as it came over the wire (without chunk framing), so that another server can send the same bytes. */
static void readers_sample(void) {
    printf("{\"event\":\"sample\",\"chunked\":%s,\"hex\":\"", R.opened && R.all[0].chunked ? "true" : "false");
    for (size_t i = 0; i < R.last.length; i++) printf("%02x", (unsigned char)R.last.at[i]);
    puts("\"}");
}

#endif
