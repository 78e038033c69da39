/* Log-linear histogram: 64 steps per power of two, so a value read back is at most 1.6 % above what was recorded. */
#ifndef HISTOGRAM_H
#define HISTOGRAM_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { HISTOGRAM_STEPS = 64, HISTOGRAM_SLOTS = 60 * HISTOGRAM_STEPS };

struct histogram {
    uint64_t count, max;
    double sum;
    uint64_t slots[HISTOGRAM_SLOTS];
};

static inline void histogram_clear(struct histogram *h) { memset(h, 0, sizeof *h); }

static inline void histogram_add(struct histogram *h, uint64_t value, uint64_t weight) {
    unsigned slot = (unsigned)value;
    if (value >= HISTOGRAM_STEPS) {
        unsigned power = 63u - (unsigned)__builtin_clzll(value);
        slot = (power - 5) * HISTOGRAM_STEPS + ((value >> (power - 6)) & (HISTOGRAM_STEPS - 1));
    }
    h->slots[slot] += weight;
    h->count += weight;
    h->sum += (double)value * (double)weight;
    if (value > h->max) h->max = value;
}

/* The highest value of the slot in which the given share (0..1) of all values is reached. */
static inline uint64_t histogram_at(const struct histogram *h, double share) {
    uint64_t wanted = (uint64_t)(share * (double)h->count + 0.999999), seen = 0;
    for (unsigned slot = 0; slot < HISTOGRAM_SLOTS; slot++) {
        seen += h->slots[slot];
        if (seen && seen >= wanted) {
            uint64_t top = slot;
            if (slot >= HISTOGRAM_STEPS) {
                unsigned power = slot / HISTOGRAM_STEPS + 5, step = slot % HISTOGRAM_STEPS;
                top = ((uint64_t)(HISTOGRAM_STEPS + step + 1) << (power - 6)) - 1;
            }
            return top < h->max ? top : h->max;
        }
    }
    return h->max;
}

/* Values are nanoseconds; printed in milliseconds. */
static inline void histogram_print(FILE *out, const char *name, const struct histogram *h) {
    fprintf(out, "\"%s\":{\"count\":%llu,\"mean_ms\":%.4f,\"p50_ms\":%.4f,\"p95_ms\":%.4f,\"p99_ms\":%.4f,\"max_ms\":%.4f}", name,
            (unsigned long long)h->count, h->count ? h->sum / (double)h->count / 1e6 : 0.0,
            (double)histogram_at(h, 0.5) / 1e6, (double)histogram_at(h, 0.95) / 1e6, (double)histogram_at(h, 0.99) / 1e6, (double)h->max / 1e6);
}

#endif
