/* Publisher: HTTP/1.1 over keep-alive connections, one update a request or in batches, each update stamped with the time it
 * was written ("message":"t=<nanoseconds of CLOCK_MONOTONIC>"); or the same over WebSocket, a message each. Other servers are
 * fed whole messages, see "feed" in load.c.
 *
 * Three ways to decide when: at a fixed rate (a schedule that never waits for answers as long as the pipeline has room; how
 * late it ran is reported), as fast as answered, or in lockstep with the readers of this process: the next update leaves when
 * the one before was answered and has reached every reader, so that no server can join two updates in one send. */
#ifndef PUBLISHER_H
#define PUBLISHER_H

#include "common.h"
#include "readers.h"

enum { PUBLISHERS = 64, DEPTH = 256, ANSWER_ROOM = 65536 };

struct publisher {
    int fd;
    char *out;
    size_t out_length, out_sent, out_room, in_length;
    unsigned head, waiting; /* the ring of what has not been answered */
    uint64_t sent_ns[DEPTH];
    char in[ANSWER_ROOM];
};

static struct {
    bool active, ndjson, spin, lines, frames, post, messages; /* spin: look for events all the time, never sleep */
    unsigned connections, depth, batch, lockstep, jobs, turn, first_number, step;
    char *host, *job, *fields, *headers;
    int port, schedule;
    double rate;
    uint64_t from_ns, until_ns, wanted, issued, answered, accepted, duplicates, failed, expected_deliveries;
    uint64_t idle_ns; /* spent looking for events that were not there */
    uint64_t latest_slip_ns, number, published; /* published: updates since the program began; numbers the jobs in turn */
    double from_cpu;
    char error_text[240];
    struct histogram answer;
    struct publisher all[PUBLISHERS];
} P;

static void publisher_fail(struct publisher *p, const char *why, size_t length) {
    keep_text(P.error_text, sizeof P.error_text, why, length);
    P.failed += p->waiting;
    p->waiting = 0;
    if (p->fd >= 0) close(p->fd);
    p->fd = -1;
}

static void publisher_flush(struct publisher *p) {
    while (p->fd >= 0 && p->out_sent < p->out_length) {
        ssize_t n = send(p->fd, p->out + p->out_sent, p->out_length - p->out_sent, MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (n < 0) { publisher_fail(p, strerror(errno), strlen(strerror(errno))); return; }
        p->out_sent += (size_t)n;
    }
    p->out_sent = p->out_length = 0;
}

/* Which job is next. */
static inline unsigned job_number(void) { return P.first_number + (unsigned)(P.published % P.jobs) * P.step; }

static size_t write_update(char *to, bool named, uint64_t stamp) {
    char *start = to;
    *to++ = '{';
    if (named) {
        to += P.jobs > 1 ? sprintf(to, "\"jobId\":\"%s-%u\",", P.job, job_number()) : sprintf(to, "\"jobId\":\"%s\",", P.job);
    }
    const char *mark = strstr(P.fields, "{n}");
    if (mark) to += sprintf(to, "%.*s%u%s", (int)(mark - P.fields), P.fields, job_number(), mark + 3);
    else to = stpcpy(to, P.fields);
    to += sprintf(to, "\"message\":\"t=%llu\"}", (unsigned long long)stamp);
    return (size_t)(to - start);
}

/* A message as a server that only passes it on sends it to readers: 150 bytes. */
static int write_message(char *to, uint64_t stamp) {
    return sprintf(to, "{\"type\":\"status_update\",\"id\":\"%010llu\",\"jobId\":\"%.12s\",\"message\":\"t=%016llu\",\"status\":\"processing\",\"progress\":45,\"version\":%llu}",
                   (unsigned long long)P.published, P.job, (unsigned long long)stamp, 100000000 + (unsigned long long)(P.published / P.jobs));
}

static int write_channel(char *to) {
    return P.jobs > 1 ? sprintf(to, "%s-%u", P.job, job_number()) : sprintf(to, "%s", P.job);
}

/* The head of a client's text frame, masked with zeros. Returns its length. */
static size_t write_frame_head(char *to, size_t length) {
    memcpy(to, (char[8]){(char)0x81, (char)0xfe, (char)(length >> 8), (char)length}, 8);
    return 8;
}

/* One request with a message, or a batch of lines, for servers that only pass messages on. */
static void publish_feed(struct publisher *p) {
    unsigned times = P.batch ? P.batch : 1;
    size_t need = (600 + strlen(P.headers) + strlen(P.job)) * times;
    if (p->out_length + need > p->out_room) {
        p->out = realloc(p->out, p->out_room = 2 * (p->out_length + need));
        if (!p->out) die("realloc");
    }
    uint64_t stamp = now_ns();
    for (unsigned i = 0; i < times; i++, P.published++) {
        char *to = p->out + p->out_length, channel[130], message[300];
        write_channel(channel);
        int length = write_message(message, stamp);
        if (P.post)
            p->out_length += (size_t)sprintf(to, "POST /pub/%s HTTP/1.1\r\nHost: %s:%d\r\nContent-Length: %d\r\n%s\r\n%s", channel, P.host, P.port, length, P.headers, message);
        else if (P.frames) { /* masked with zeros */
            size_t text = (size_t)sprintf(to + 8, "%s\t%s", channel, message);
            p->out_length += write_frame_head(to, text) + text;
        } else p->out_length += (size_t)sprintf(to, "%s\t%s\n", channel, message);
        if (P.post) p->sent_ns[(p->head + p->waiting++) % DEPTH] = stamp;
        else P.accepted++;
    }
    P.issued++;
    P.expected_deliveries += times * (uint64_t)R.ready;
    publisher_flush(p);
}

static void publish_one(struct publisher *p) {
    if (P.lines || P.frames || P.post) { publish_feed(p); return; }
    size_t each = strlen(P.fields) + strlen(P.job) + 100, need = 600 + strlen(P.headers) + (P.batch ? P.batch : 1) * each;
    if (p->out_length + need > p->out_room) {
        p->out = realloc(p->out, p->out_room = p->out_length + need);
        if (!p->out) die("realloc");
    }
    char *body = p->out + p->out_length + 500 + strlen(P.headers), *to = body;
    uint64_t stamp = now_ns();
    char path[200];
    if (P.messages) {
        to += sprintf(to, "{\"type\":\"publish\",\"updates\":[");
        for (unsigned i = 0; i < (P.batch ? P.batch : 1); i++, P.published++) {
            if (i) *to++ = ',';
            to += write_update(to, true, stamp);
        }
        to = stpcpy(to, "]}");
    } else if (!P.batch) {
        if (P.jobs > 1) snprintf(path, sizeof path, "/api/v2/jobs/%s-%u/updates", P.job, job_number());
        else snprintf(path, sizeof path, "/api/v2/jobs/%s/updates", P.job);
        to += write_update(to, false, stamp);
        P.published++;
    } else {
        strcpy(path, "/api/v2/updates");
        if (!P.ndjson) *to++ = '[';
        for (unsigned i = 0; i < P.batch; i++, P.published++) {
            if (i) *to++ = P.ndjson ? '\n' : ',';
            to += write_update(to, true, stamp);
        }
        *to++ = P.ndjson ? '\n' : ']';
    }
    size_t length = (size_t)(to - body);
    int head;
    if (P.messages) head = (int)write_frame_head(p->out + p->out_length, length);
    else head = sprintf(p->out + p->out_length, "POST %s HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: %s\r\nContent-Length: %zu\r\n%s\r\n", path, P.host,
                       P.port, P.batch && P.ndjson ? "application/x-ndjson" : "application/json", length, P.headers);
    memmove(p->out + p->out_length + head, body, length);
    p->out_length += (size_t)head + length;
    p->sent_ns[(p->head + p->waiting++) % DEPTH] = stamp;
    P.issued++;
    P.expected_deliveries += (P.batch ? P.batch : 1) * (uint64_t)R.ready;
    publisher_flush(p);
}

static uint64_t waiting_answers(void) {
    uint64_t n = 0;
    for (unsigned i = 0; i < P.connections; i++) n += P.all[i].waiting;
    return n;
}

static bool unsent(void) {
    for (unsigned i = 0; i < P.connections; i++)
        if (P.all[i].fd >= 0 && P.all[i].out_sent < P.all[i].out_length) return true;
    return false;
}

/* Whether another update may be on its way. */
static bool lockstep_room(void) {
    uint64_t each = (P.batch ? P.batch : 1) * (uint64_t)R.ready;
    return R.deliveries + (P.lockstep - 1) * each >= P.expected_deliveries;
}

static void publish_done(void) {
    double seconds = (double)(now_ns() - P.from_ns) / 1e9;
    uint64_t unanswered = waiting_answers();
    P.active = false;
    timer_set(P.schedule, 0);
    for (unsigned i = 0; i < P.connections; i++) {
        if (P.all[i].fd >= 0) close(P.all[i].fd);
        free(P.all[i].out);
    }
    printf("{\"event\":\"published\",\"requests\":%llu,\"accepted\":%llu,\"duplicates\":%llu,\"failed\":%llu,\"unanswered\":%llu,\"seconds\":%.6f,"
           "\"cpu_seconds\":%.6f,\"idle_seconds\":%.6f,\"latest_slip_ms\":%.3f,\"error\":\"%s\",", (unsigned long long)P.issued, (unsigned long long)P.accepted,
           (unsigned long long)P.duplicates, (unsigned long long)P.failed, (unsigned long long)unanswered, seconds, cpu_seconds() - P.from_cpu, (double)P.idle_ns / 1e9,
           (double)P.latest_slip_ns / 1e6, P.error_text);
    histogram_print(stdout, "answer", &P.answer);
    puts("}");
}

/* Publishes whatever is due and has room; ends the run when nothing more is to come. */
static void publish_more(void) {
    if (!P.active) return;
    uint64_t now = now_ns(), due = P.wanted ? P.wanted : UINT64_MAX;
    bool over = P.until_ns && now >= P.until_ns;
    double period = P.rate > 0 ? (double)(P.batch ? P.batch : 1) / P.rate * 1e9 : 0;
    if (P.rate > 0) {
        uint64_t scheduled = (uint64_t)((double)((P.until_ns && now > P.until_ns ? P.until_ns : now) - P.from_ns) / period) + !over;
        if (scheduled < due) due = scheduled;
        over = over && P.issued >= due;
    }
    unsigned alive = 0;
    for (unsigned i = 0; i < P.connections; i++) alive += P.all[i].fd >= 0;
    while (alive && !over && P.issued < due) {
        if (P.lockstep && P.issued && (waiting_answers() >= P.lockstep || !lockstep_room())) break;
        struct publisher *p = NULL;
        for (unsigned i = 0; i < P.connections && !p; i++) {
            struct publisher *candidate = &P.all[P.turn++ % P.connections];
            if (candidate->fd >= 0 && candidate->waiting < P.depth) p = candidate;
        }
        if (!p) break;
        if (P.rate > 0) {
            uint64_t planned = P.from_ns + (uint64_t)((double)P.issued * period), sent = now_ns();
            if (sent > planned && sent - planned > P.latest_slip_ns) P.latest_slip_ns = sent - planned;
        }
        publish_one(p);
        if (P.until_ns && P.rate <= 0) over = now_ns() >= P.until_ns;
    }
    if (P.rate > 0) { /* wake for the next one in time, not a period after this one */
        uint64_t planned = P.from_ns + (uint64_t)((double)P.issued * period), after = now_ns();
        timer_set(P.schedule, planned > after + 50000 ? (planned - after < 100000000u ? planned - after : 100000000u) : 50000);
    }
    bool complete = over || (P.wanted && P.issued >= P.wanted) || !alive;
    bool late = P.until_ns && now > P.until_ns + 5000000000u; /* answers that took longer count as unanswered */
    if (complete && (late || (!waiting_answers() && !unsent() && (!P.lockstep || R.deliveries >= P.expected_deliveries)))) publish_done();
}

static void answered(struct publisher *p) {
    histogram_add(&P.answer, now_ns() - p->sent_ns[p->head], 1);
    p->head = (p->head + 1) % DEPTH;
    p->waiting--;
    P.answered++;
}

/* What became of a batch. */
static void accepted(const char *text, size_t length, unsigned wanted) {
    size_t hint = 0;
    int64_t accepted = number_after(text, length, "\"accepted\":", 11, &hint);
    hint = 0;
    int64_t duplicates = number_after(text, length, "\"duplicates\":", 13, &hint);
    P.accepted += accepted > 0 ? (uint64_t)accepted : 0;
    P.duplicates += duplicates > 0 ? (uint64_t)duplicates : 0;
    if (accepted != (int64_t)wanted) keep_text(P.error_text, sizeof P.error_text, text, length);
}

/* One message over WebSocket, answers and others. */
static size_t take_message(struct publisher *p, const char *at, size_t n) {
    if (n < 4) return 0;
    size_t size = (uint8_t)at[1], head = size == 126 ? 4 : 2;
    if (size == 126) size = (size_t)(uint8_t)at[2] << 8 | (uint8_t)at[3];
    if (head + size > n) return 0;
    const char *text = at + head;
    if (memmem(text, size, "\"type\":\"published\"", 18)) {
        answered(p);
        accepted(text, size, P.batch ? P.batch : 1);
    } else if (memmem(text, size, "\"type\":\"error\"", 14)) {
        answered(p);
        P.failed++;
        keep_text(P.error_text, sizeof P.error_text, text, size);
    }
    return head + size;
}

/* Takes in one answer if it is there whole: its length, or 0. */
static size_t take_answer(struct publisher *p, const char *at, size_t n) {
    if (P.messages) return take_message(p, at, n);
    const char *end = memmem(at, n, "\r\n\r\n", 4);
    if (!end) return 0;
    size_t head = (size_t)(end + 4 - at), body = 0;
    for (const char *line = at; line < end; line = (const char *)memchr(line, '\n', (size_t)(end + 4 - line)) + 1)
        if (!strncasecmp(line, "content-length:", 15)) body = strtoul(line + 15, NULL, 10);
    if (head + body > n) return 0;
    int status = atoi(at + 9);
    answered(p);
    if (status / 100 != 2) {
        P.failed++;
        keep_text(P.error_text, sizeof P.error_text, at + head, body);
    } else if (P.batch) {
        accepted(at + head, body, P.batch);
    } else {
        P.accepted++;
    }
    return head + body;
}

static void publisher_event(struct publisher *p, uint32_t events) {
    if (!P.active || p->fd < 0) return;
    if (events & EPOLLOUT) publisher_flush(p);
    while (p->fd >= 0) {
        ssize_t n = recv(p->fd, p->in + p->in_length, ANSWER_ROOM - p->in_length, 0);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) break;
        if (n <= 0) { publisher_fail(p, "publisher connection closed", 27); break; }
        p->in_length += (size_t)n;
        size_t from = 0, length;
        while (p->waiting && (length = take_answer(p, p->in + from, p->in_length - from))) from += length;
        memmove(p->in, p->in + from, p->in_length -= from);
        if (p->in_length == ANSWER_ROOM) { publisher_fail(p, "answer too large", 16); break; }
    }
    publish_more();
}

static void publish_start(const char *command) {
    if (P.active) { puts("{\"event\":\"error\",\"error\":\"a publish run is under way\"}"); return; }
    free(P.host); free(P.job); free(P.fields); free(P.headers);
    P.host = json_string(command, "host", "127.0.0.1");
    P.port = (int)json_number(command, "port", 3000);
    P.job = json_string(command, "job", "bench");
    P.fields = json_string(command, "fields", "\"userId\":\"bench\",\"status\":\"processing\",\"progress\":45,");
    P.headers = json_string(command, "headers", "");
    P.jobs = (unsigned)json_number(command, "jobs", 1);
    P.first_number = (unsigned)json_number(command, "first", 0);
    P.step = (unsigned)json_number(command, "step", 1);
    P.connections = (unsigned)json_number(command, "connections", 1);
    P.depth = (unsigned)json_number(command, "depth", 1);
    P.batch = (unsigned)json_number(command, "batch", 0);
    P.ndjson = json_number(command, "ndjson", 0) != 0;
    P.rate = json_number(command, "rate", 0);
    P.wanted = (uint64_t)json_number(command, "requests", 0);
    P.spin = json_number(command, "spin", 0) != 0;
    P.lockstep = (unsigned)json_number(command, "lockstep", 0);
    char *feed = json_string(command, "feed", "");
    P.lines = !strcmp(feed, "lines");
    P.frames = !strcmp(feed, "frames");
    P.post = !strcmp(feed, "post");
    P.messages = !strcmp(feed, "messages");
    free(feed);
    double seconds = json_number(command, "seconds", 0);
    if (!P.connections || P.connections > PUBLISHERS || !P.depth || P.depth > DEPTH || !(P.wanted || seconds > 0) || strlen(P.job) > 100) {
        puts("{\"event\":\"error\",\"error\":\"connections 1-64, depth 1-256, and requests or seconds are needed\"}");
        return;
    }
    P.issued = P.answered = P.accepted = P.duplicates = P.failed = P.latest_slip_ns = P.idle_ns = 0;
    P.expected_deliveries = R.deliveries;
    P.turn = 0;
    P.error_text[0] = 0;
    histogram_clear(&P.answer);
    struct sockaddr_in peer = address(P.host, P.port);
    for (unsigned i = 0; i < P.connections; i++) {
        struct publisher *p = &P.all[i];
        memset(p, 0, offsetof(struct publisher, in));
        p->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        int one = 1;
        setsockopt(p->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (connect(p->fd, (struct sockaddr *)&peer, sizeof peer) < 0) die("connect (publisher)");
        if (P.frames || P.messages) {
            dprintf(p->fd, "GET %s HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n", P.frames ? "/feed" : "/ws/jobs", P.host, P.port);
            char answer[2048] = "";
            ssize_t n = recv(p->fd, answer, sizeof answer - 1, 0);
            char *rest = strstr(answer, "\r\n\r\n");
            if (n < 12 || atoi(answer + 9) != 101 || !rest) die("the feed's handshake");
            p->in_length = (size_t)(answer + n - (rest + 4)); /* a greeting may have come with it */
            memcpy(p->in, rest + 4, p->in_length);
        }
        fcntl(p->fd, F_SETFL, O_NONBLOCK);
        watch(p->fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, TAG_PUBLISHER, i);
    }
    P.active = true;
    P.from_cpu = cpu_seconds();
    P.from_ns = now_ns();
    P.until_ns = seconds > 0 ? P.from_ns + (uint64_t)(seconds * 1e9) : 0;
    timer_set(P.schedule, 100000000u); /* it also ends a run whose answers stay away, so it runs in every mode */
    publish_more();
}

#endif
