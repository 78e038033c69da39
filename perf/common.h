/* What the parts of the load client share: the clock, the epoll loop's tags, flat JSON commands and answers. */
#ifndef COMMON_H
#define COMMON_H

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "histogram.h"

/* What an epoll event belongs to: the upper half of its data; the lower half is an index. */
enum tag { TAG_STDIN, TAG_ARRIVALS, TAG_SCHEDULE, TAG_READER, TAG_PUBLISHER };

static int epoll_fd;

static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline double cpu_seconds(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static inline void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static inline void watch(int fd, uint32_t events, enum tag tag, uint32_t index) {
    struct epoll_event event = {.events = events, .data.u64 = (uint64_t)tag << 32 | index};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0) die("epoll_ctl");
}

static inline int timer_open(enum tag tag) {
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (fd < 0) die("timerfd_create");
    watch(fd, EPOLLIN, tag, 0);
    return fd;
}

/* Fires every period nanoseconds from now on; 0 stops it. */
static inline void timer_set(int fd, uint64_t period) {
    struct timespec t = {.tv_sec = (time_t)(period / 1000000000u), .tv_nsec = (long)(period % 1000000000u)};
    struct itimerspec spec = {.it_interval = t, .it_value = t};
    timerfd_settime(fd, 0, &spec, NULL);
}

static inline void timer_clear(int fd) {
    uint64_t fired;
    while (read(fd, &fired, sizeof fired) > 0) {}
}

static inline struct sockaddr_in address(const char *host, int port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, host, &a.sin_addr) != 1) {
        fprintf(stderr, "load: host must be an IPv4 address, not %s\n", host);
        exit(1);
    }
    return a;
}

/* Commands are flat JSON objects: the value of a key, or NULL. Keys inside string values are not mistaken for keys. */
static inline const char *json_value(const char *text, const char *key) {
    size_t length = strlen(key);
    for (const char *p = text; *p; p++) {
        if (*p != '"') continue;
        const char *start = ++p;
        while (*p && *p != '"') p += (*p == '\\' && p[1]) ? 2 : 1;
        if (!*p) return NULL;
        const char *after = p + 1;
        while (*after == ' ') after++;
        if (*after == ':' && (size_t)(p - start) == length && !memcmp(start, key, length)) {
            after++;
            while (*after == ' ') after++;
            return after;
        }
    }
    return NULL;
}

static inline double json_number(const char *text, const char *key, double otherwise) {
    const char *value = json_value(text, key);
    if (!value) return otherwise;
    if (*value == 't') return 1;
    if (*value == 'f' || *value == 'n') return 0;
    return strtod(value, NULL);
}

/* A fresh copy, unescaped (ASCII escapes only). */
static inline char *json_string(const char *text, const char *key, const char *otherwise) {
    const char *value = json_value(text, key);
    if (!value || *value != '"') return strdup(otherwise);
    char *copy = malloc(strlen(value) + 1), *to = copy;
    for (value++; *value && *value != '"'; value++) {
        if (*value == '\\' && value[1]) {
            value++;
            *to++ = *value == 'n' ? '\n' : *value == 'r' ? '\r' : *value == 't' ? '\t' : *value;
        } else {
            *to++ = *value;
        }
    }
    *to = 0;
    return copy;
}

/* A fresh copy in which "{n}", if it is there, is the number. */
static inline char *with_number(const char *text, unsigned number) {
    char *copy = malloc(strlen(text) + 12);
    const char *mark = strstr(text, "{n}");
    if (mark) sprintf(copy, "%.*s%u%s", (int)(mark - text), text, number, mark + 3);
    else strcpy(copy, text);
    return copy;
}

/* Remembers the beginning of a text that explains an error, made safe to stand inside a JSON string. */
static inline void keep_text(char *to, size_t room, const char *from, size_t length) {
    if (*to) return; /* the first error explains most */
    size_t n = length < room - 1 ? length : room - 1;
    for (size_t i = 0; i < n; i++) to[i] = from[i] == '"' ? '\'' : (from[i] < ' ' || from[i] > '~' || from[i] == '\\') ? ' ' : from[i];
    to[n] = 0;
}

#endif
