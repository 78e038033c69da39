/* Readers: many WebSocket or SSE connections or long-poll clients that count what they get, check that nothing is lost or
 * repeated, and time it.
 *
 * Bytes are taken in with large reads. A read is cut into whole messages first (only frame headers, or blank lines, are looked
 * at), then the messages are looked into: each one, or, with "sample" above 1, the first, the last and every sample-th between.
 * Versions of a job go up by one, so a read in which every sampled message has the version its place demands holds what it
 * should; a read that does not is gone through message by message. Latencies of sampled messages stand for their neighbours. */
#ifndef READERS_H
#define READERS_H

#include "common.h"

enum phase { PHASE_CLOSED, PHASE_CONNECTING, PHASE_HEAD, PHASE_STREAM };
enum chunk { CHUNK_SIZE, CHUNK_EXTENSION, CHUNK_DATA, CHUNK_END };
enum { READ_SIZE = 256 * 1024, BATCH = 8192, LARGEST_MESSAGE = 64 << 20 };

struct reader {
    int fd;
    uint8_t phase, chunk;
    bool chunked, ready, full, carry_used; /* carry_used: carry is a whole message of the current batch */
    uint32_t index, carry_length, carry_room;
    uint64_t chunk_left, opened_ns;
    int64_t version; /* of the last update or snapshot; -1: none yet */
    char *carry;     /* the beginning of a message whose end has not come yet */
};

struct message { const char *at; size_t length; };

static struct {
    /* what to do */
    struct sockaddr_in peer;
    bool websocket, poll, check, churn;
    char *subscribe, *host, *path, *headers; /* {n} in path or subscribe: a number of each reader's own */
    unsigned wanted, opened, sample, full_every, window, sources, rcvbuf, first_number, step, turn;
    double rate;
    uint64_t arrivals_from_ns, churn_until_ns;
    int arrivals;
    /* the connections */
    struct reader *all;
    unsigned pending, ready, closed, failed, source;
    bool told_ready;
    /* since the last mark */
    uint64_t mark_ns, bytes, reads, deliveries, snapshots, others, lost, repeated, resets, errors, rescans, finished;
    double mark_cpu;
    struct histogram latency, setup, first;
    char error_text[240];
    struct message last; /* the newest update seen on connection 0, for whoever wants to send the same */
    size_t last_room;
    /* the current batch */
    struct message batch[BATCH];
    unsigned batched;
    uint64_t read_ns, delivered_ns; /* when the newest bytes, and the newest update, came */
    size_t version_hint, time_hint;
} R;

static char read_buffer[READ_SIZE];

static void reader_open(struct reader *r);

static void reader_error(const char *what, size_t length) {
    R.errors++;
    keep_text(R.error_text, sizeof R.error_text, what, length);
}

static void reader_close(struct reader *r) {
    if (r->phase == PHASE_CLOSED) return;
    if (!r->ready) R.pending--;
    else R.ready--;
    close(r->fd);
    free(r->carry);
    r->carry = NULL;
    r->carry_length = r->carry_room = 0;
    r->phase = PHASE_CLOSED;
}

static void tell_ready(void) {
    if (R.told_ready || R.churn || !R.wanted || R.opened < R.wanted || R.pending) return;
    R.told_ready = true;
    printf("{\"event\":\"ready\",\"connections\":%u,\"failed\":%u,\"error\":\"%s\"}\n", R.ready, R.failed, R.error_text);
}

/* The connection ended by itself or was refused. */
static void reader_failed(struct reader *r, const char *why) {
    char text[120];
    int length = snprintf(text, sizeof text, "%s (connection %u)", why, r->index);
    if (!r->ready) R.failed++;
    R.closed++;
    reader_error(text, (size_t)length);
    reader_close(r);
    tell_ready();
}

static void carry_append(struct reader *r, const char *p, size_t n) {
    if (r->carry_length + n > r->carry_room) {
        r->carry_room = (uint32_t)(r->carry_length + n + 512);
        r->carry = realloc(r->carry, r->carry_room);
        if (!r->carry) die("realloc");
    }
    memcpy(r->carry + r->carry_length, p, n);
    r->carry_length += (uint32_t)n;
}

/* ---- looking into a message ---- */

/* The digits behind a mark; the place of the last hit is tried first, since messages in a row look alike. -1: not there. */
static inline int64_t number_after(const char *at, size_t length, const char *mark, size_t mark_length, size_t *hint) {
    const char *found = NULL;
    if (*hint + mark_length + 1 < length && !memcmp(at + *hint, mark, mark_length)) found = at + *hint;
    else if ((found = memmem(at, length, mark, mark_length))) *hint = (size_t)(found - at);
    if (!found) return -1;
    int64_t value = 0;
    const char *p = found + mark_length, *end = at + length;
    if (p >= end || *p < '0' || *p > '9') return -1;
    while (p < end && *p >= '0' && *p <= '9') value = value * 10 + (*p++ - '0');
    return value;
}

static inline int64_t version_of(const struct message *m) {
    return number_after(m->at, m->length, "\"version\":", 10, &R.version_hint);
}

static inline void time_message(const struct message *m, uint64_t weight) {
    int64_t sent = number_after(m->at, m->length, "\"message\":\"t=", 13, &R.time_hint);
    if (sent > 0) histogram_add(&R.latency, R.read_ns > (uint64_t)sent ? R.read_ns - (uint64_t)sent : 0, weight);
}

static void reader_send(struct reader *r, const char *bytes, size_t length) {
    if (send(r->fd, bytes, length, MSG_NOSIGNAL) != (ssize_t)length) reader_failed(r, "send was short");
}

static void keep_last(const struct message *m) {
    if (m->length > R.last_room) R.last.at = realloc((void *)R.last.at, R.last_room = m->length + 64);
    memcpy((void *)R.last.at, m->at, m->length);
    R.last.length = m->length;
}

static void got_snapshot(struct reader *r, const struct message *m) {
    R.snapshots++;
    int64_t version = version_of(m);
    r->version = version;
    if (r->ready) return;
    r->ready = true;
    R.pending--;
    R.ready++;
    histogram_add(&R.first, R.read_ns - r->opened_ns, 1);
}

/* One whole message: a WebSocket frame, or the lines of one SSE event. */
static void look_into(struct reader *r, const struct message *m) {
    if (R.websocket) {
        unsigned opcode = (unsigned char)m->at[0] & 15;
        size_t skip = ((unsigned char)m->at[1] & 127) == 126 ? 4 : ((unsigned char)m->at[1] & 127) == 127 ? 10 : 2;
        if (opcode == 9 && m->length - skip <= 125) { /* a ping wants its payload back, masked (with a mask of zeros) */
            char pong[131] = {(char)0x8a, (char)(0x80 | (m->length - skip))};
            memcpy(pong + 6, m->at + skip, m->length - skip);
            reader_send(r, pong, 6 + m->length - skip);
        }
        if (opcode == 8) {
            char why[40];
            snprintf(why, sizeof why, "closed with %u", m->length >= skip + 2 ? (unsigned)((unsigned char)m->at[skip] << 8 | (unsigned char)m->at[skip + 1]) : 1005);
            reader_failed(r, why);
            return;
        }
        if (opcode != 1) { R.others++; return; }
        if (!(m->at[0] & 0x80)) reader_error("fragmented message", 18);
    }
    const char *type = memmem(m->at, m->length, "\"type\":\"", 8);
    size_t left = type ? m->length - (size_t)(type + 8 - m->at) : 0;
    if (type) type += 8;
#define TYPE_IS(word) (left >= sizeof(word) - 1 && !memcmp(type, word, sizeof(word) - 1))
    if (TYPE_IS("status_update\"") || TYPE_IS("job_")) {
        R.deliveries++;
        R.delivered_ns = R.read_ns;
        if (R.check) {
            int64_t version = version_of(m);
            if (version < 0) reader_error(m->at, m->length);
            if (r->version >= 0 && version > r->version + 1) R.lost += (uint64_t)(version - r->version - 1);
            if (r->version >= 0 && version <= r->version) R.repeated++;
            if (version > r->version) r->version = version;
        }
        time_message(m, 1);
        if (r->index == 0) keep_last(m);
    } else if (TYPE_IS("subscribed\"") || (TYPE_IS("snapshot\"") && !memmem(m->at, m->length, "\"more\":true", 11))) {
        got_snapshot(r, m);
    } else if (TYPE_IS("reset\"")) {
        R.resets++;
    } else if (TYPE_IS("error\"")) {
        reader_error(m->at, m->length);
    } else {
        R.others++;
    }
#undef TYPE_IS
}

static void finish_batch(struct reader *r) {
    unsigned n = R.batched, step = r->full ? 1 : R.sample;
    R.batched = 0;
    bool as_expected = step > 1 && n > 2 && R.check && r->version >= 0;
    for (unsigned i = 0; as_expected && i < n; i = i + step < n || i == n - 1 ? i + step : n - 1)
        as_expected = version_of(&R.batch[i]) == r->version + 1 + (int64_t)i;
    if (as_expected) {
        for (unsigned i = 0; i < n; i += step) time_message(&R.batch[i], n - i < step ? n - i : step);
        R.deliveries += n;
        r->version += n;
        if (r->index == 0) keep_last(&R.batch[n - 1]);
        R.delivered_ns = R.read_ns;
    } else {
        R.rescans += step > 1 && n > 2 && r->version >= 0;
        for (unsigned i = 0; i < n && r->phase == PHASE_STREAM; i++) look_into(r, &R.batch[i]);
    }
    if (r->carry_used) {
        r->carry_used = false;
        r->carry_length = 0;
    }
}

static inline void batch_add(struct reader *r, const char *at, size_t length) {
    if (R.batched == BATCH) finish_batch(r);
    R.batch[R.batched++] = (struct message){at, length};
}

static unsigned reader_number(const struct reader *r) {
    return R.first_number + (R.turn ? r->index % R.turn : r->index) * R.step;
}

/* A text frame from a client, masked with zeros: the mask must be there, its value is free (RFC 6455, section 5.3). */
static void reader_subscribe(struct reader *r) {
    char *text = with_number(R.subscribe, reader_number(r));
    size_t n = strlen(text), head = n < 126 ? 6 : 8;
    char *frame = calloc(1, head + n + 1);
    frame[0] = (char)0x81;
    frame[1] = (char)(0x80 | (n < 126 ? n : 126));
    if (n >= 126) frame[2] = (char)(n >> 8), frame[3] = (char)n;
    memcpy(frame + head, text, n);
    reader_send(r, frame, head + n);
    free(frame);
    free(text);
}

/* Asks for the stream, or for what came after the cursor. One with a line end is a header. */
static void reader_request(struct reader *r, const char *cursor) {
    char *path = with_number(R.path, reader_number(r)), more[100] = "";
    bool header = strchr(cursor, '\n');
    if (R.poll && !header) snprintf(more, sizeof more, *cursor ? "&timeout=30&last_seen=%s" : "&timeout=0%s", cursor);
    char *request = malloc(strlen(path) + strlen(R.headers) + strlen(R.host) + 500);
    int length = sprintf(request, "GET %s%s HTTP/1.1\r\nHost: %s:%d\r\n%s%s%s\r\n", path, more, R.host, ntohs(R.peer.sin_port),
        R.websocket ? "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        : R.poll ? "" : "Accept: text/event-stream\r\n", header ? cursor : "", R.headers);
    reader_send(r, request, (size_t)length);
    free(request);
    free(path);
}

/* ---- cutting bytes into messages ---- */

/* Bytes of the whole frame that starts here, 0 while its header is not complete (RFC 6455, section 5.2; servers do not mask). */
static inline uint64_t frame_length(const char *at, size_t n) {
    const unsigned char *p = (const unsigned char *)at;
    if (n < 2) return 0;
    unsigned short_length = p[1] & 127;
    if (short_length < 126) return 2 + short_length;
    if (short_length == 126) return n < 4 ? 0 : 4 + (uint64_t)(p[2] << 8 | p[3]);
    if (n < 10) return 0;
    uint64_t length = 0;
    for (int i = 2; i < 10; i++) length = length << 8 | p[i];
    return 10 + length;
}

/* Bytes up to and with the blank line that ends an event, 0 if it is not there. */
static inline size_t event_length(const char *at, size_t n) {
    const char *p = at, *end = at + n;
    while ((p = memchr(p, '\n', (size_t)(end - p))) && p + 1 < end) {
        if (p[1] == '\n') return (size_t)(p + 2 - at);
        p++;
    }
    return 0;
}

static void feed_frames(struct reader *r, const char *p, size_t n) {
    if (r->carry_length) {
        uint64_t length;
        while (!(length = frame_length(r->carry, r->carry_length)) && n) { carry_append(r, p++, 1); n--; }
        if (!length) return;
        if (length > LARGEST_MESSAGE) { reader_failed(r, "message too large"); return; }
        size_t take = length - r->carry_length < n ? (size_t)(length - r->carry_length) : n;
        carry_append(r, p, take);
        p += take;
        n -= take;
        if (r->carry_length < length) return;
        batch_add(r, r->carry, (size_t)length);
        r->carry_used = true;
    }
    uint64_t length;
    while (n && (length = frame_length(p, n)) && length <= n) {
        batch_add(r, p, (size_t)length);
        p += length;
        n -= (size_t)length;
    }
    if (r->carry_used && n) finish_batch(r);
    if (n && r->phase == PHASE_STREAM) carry_append(r, p, n);
}

static void feed_events(struct reader *r, const char *p, size_t n) {
    if (r->carry_length) {
        size_t take = r->carry[r->carry_length - 1] == '\n' && n && *p == '\n' ? 1 : event_length(p, n);
        carry_append(r, p, take ? take : n);
        if (!take) return;
        p += take;
        n -= take;
        batch_add(r, r->carry, r->carry_length);
        r->carry_used = true;
    }
    size_t length;
    while (n && (length = event_length(p, n))) {
        batch_add(r, p, length);
        p += length;
        n -= length;
    }
    if (r->carry_used && n) finish_batch(r);
    if (n && r->phase == PHASE_STREAM) carry_append(r, p, n);
}

static void reader_request(struct reader *r, const char *cursor);

/* The body of a whole answer, chunks joined in place: its length; -1 if the answer is not there whole. *end: behind it. */
static int64_t answer_body(char *at, size_t n, char **body, char **end) {
    char *head_end = memmem(at, n, "\r\n\r\n", 4), *stop = at + n;
    if (!head_end) return -1;
    char *p = head_end + 4, *to = p;
    *body = p;
    *head_end = 0;
    bool chunked = strcasestr(at, "\ntransfer-encoding: chunked") != NULL;
    const char *length = strcasestr(at, "\ncontent-length:");
    *head_end = '\r';
    if (!chunked) {
        size_t n_body = length ? strtoul(length + 16, NULL, 10) : 0;
        *end = p + n_body;
        return *end <= stop ? (int64_t)n_body : -1;
    }
    for (char *q = p;;) { /* first look whether all of it is there, since joining cannot be done twice */
        char *line = memmem(q, (size_t)(stop - q), "\r\n", 2);
        if (!line) return -1;
        size_t size = strtoul(q, NULL, 16);
        if ((size_t)(stop - line) < size + 4) return -1;
        q = line + 2 + size + 2;
        if (!size) break;
    }
    for (;;) {
        char *line = memmem(p, (size_t)(stop - p), "\r\n", 2);
        size_t size = strtoul(p, NULL, 16);
        p = line + 2 + size + 2;
        if (!size) break;
        memmove(to, line + 2, size);
        to += size;
    }
    *end = p;
    return to - *body;
}

/* Where nchan's subscribers stand is in two headers of the answer, which they give back. */
static void cursor_in_head(const char *at, char *cursor, size_t room) {
    const char *modified = strcasestr(at, "\nlast-modified: "), *etag = strcasestr(at, "\netag: ");
    if (!modified || !etag) return;
    snprintf(cursor, room, "If-Modified-Since: %.*s\r\nIf-None-Match: %.*s\r\n", (int)strcspn(modified + 16, "\r"), modified + 16,
             (int)strcspn(etag + 7, "\r"), etag + 7);
}

/* Long-poll: each answer's updates one by one, then the next question with its cursor. */
static void feed_answers(struct reader *r, const char *p, size_t n) {
    char *body, *end;
    carry_append(r, p, n);
    int64_t length = answer_body(r->carry, r->carry_length, &body, &end);
    if (length < 0) return;
    int status = atoi(r->carry + 9);
    const char *stop = body + length, *mark = memmem(body, (size_t)length, "\"last_seen\":\"", 13);
    char cursor[160] = "";
    if (mark) {
        const char *quote = memchr(mark + 13, '"', (size_t)(stop - mark - 13));
        if (quote && quote - mark - 13 < 60) memcpy(cursor, mark + 13, (size_t)(quote - mark - 13));
        if (memmem(mark, (size_t)(stop - mark), "\"reset\":true", 12)) R.resets++;
    } else {
        char first = *body; /* a head is text that ends here */
        *body = 0;
        cursor_in_head(r->carry, cursor, sizeof cursor);
        *body = first;
    }
    if (status != 200 || !*cursor) {
        reader_error(r->carry, r->carry_length);
        reader_failed(r, "refused");
        return;
    }
    if (!r->ready) {
        histogram_add(&R.setup, R.read_ns - r->opened_ns, 1);
        got_snapshot(r, &(struct message){body, (size_t)length});
    } else {
        const char *at = memmem(body, (size_t)length, "{\"type\":\"", 9);
        while (at && r->phase == PHASE_STREAM) {
            const char *next = memmem(at + 9, (size_t)(stop - at - 9), "{\"type\":\"", 9);
            look_into(r, &(struct message){at, (size_t)((next ? next : stop) - at)});
            at = next;
        }
    }
    r->carry_length = 0;
    if (r->phase == PHASE_STREAM) reader_request(r, cursor);
}

/* RFC 9112, section 7.1. An event may end in another chunk than it began in. */
static void feed_chunks(struct reader *r, const char *p, size_t n) {
    while (n && r->phase == PHASE_STREAM) {
        char c = *p;
        size_t take = 1;
        switch (r->chunk) {
        case CHUNK_SIZE:
            if (c >= '0' && c <= '9') r->chunk_left = r->chunk_left * 16 + (uint64_t)(c - '0');
            else if ((c | 32) >= 'a' && (c | 32) <= 'f') r->chunk_left = r->chunk_left * 16 + (uint64_t)((c | 32) - 'a' + 10);
            else if (c == '\n') {
                if (!r->chunk_left) { finish_batch(r); reader_failed(r, "the stream ended"); return; }
                r->chunk = CHUNK_DATA;
            } else r->chunk = CHUNK_EXTENSION, take = 0;
            break;
        case CHUNK_EXTENSION:
            if (c == '\n') r->chunk = CHUNK_SIZE, take = 0; /* the line end is handled in one place */
            break;
        case CHUNK_DATA:
            take = r->chunk_left < n ? (size_t)r->chunk_left : n;
            if (r->carry_used) finish_batch(r);
            feed_events(r, p, take);
            r->chunk_left -= take;
            if (!r->chunk_left) r->chunk = CHUNK_END;
            break;
        default:
            if (c == '\n') r->chunk = CHUNK_SIZE;
        }
        p += take;
        n -= take;
    }
}

static void feed(struct reader *r, const char *p, size_t n) {
    if (R.poll) {
        r->phase = PHASE_STREAM;
        feed_answers(r, p, n);
        return;
    }
    if (r->phase == PHASE_HEAD) {
        carry_append(r, p, n);
        const char *end = memmem(r->carry, r->carry_length, "\r\n\r\n", 4);
        if (!end) return;
        size_t rest = r->carry_length - (size_t)(end + 4 - r->carry);
        int status = r->carry_length > 12 ? atoi(r->carry + 9) : 0;
        if (status != (R.websocket ? 101 : 200)) {
            reader_error(r->carry, r->carry_length);
            reader_failed(r, "refused");
            return;
        }
        r->carry[end - r->carry] = 0;
        r->chunked = strcasestr(r->carry, "\ntransfer-encoding: chunked") != NULL;
        r->carry_length = 0;
        r->phase = PHASE_STREAM;
        histogram_add(&R.setup, R.read_ns - r->opened_ns, 1);
        if (R.websocket && *R.subscribe) reader_subscribe(r);
        p += n - rest;
        n = rest;
    }
    if (!n || r->phase != PHASE_STREAM) return;
    if (R.websocket) feed_frames(r, p, n);
    else if (r->chunked) feed_chunks(r, p, n);
    else feed_events(r, p, n);
    if (r->phase == PHASE_STREAM) finish_batch(r);
    R.batched = 0;
}

/* ---- connections ---- */

static void reader_event(struct reader *r, uint32_t events) {
    if (r->phase == PHASE_CONNECTING) {
        int error = 0;
        socklen_t length = sizeof error;
        getsockopt(r->fd, SOL_SOCKET, SO_ERROR, &error, &length);
        if (error) { reader_failed(r, strerror(error)); return; }
        if (!(events & EPOLLOUT)) return;
        r->phase = PHASE_HEAD;
        reader_request(r, "");
    }
    while (r->phase != PHASE_CLOSED) {
        ssize_t n = recv(r->fd, read_buffer, READ_SIZE, 0);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) break;
        if (n <= 0) { reader_failed(r, n ? strerror(errno) : "closed by the server"); break; }
        R.bytes += (uint64_t)n;
        R.reads++;
        R.read_ns = now_ns();
        feed(r, read_buffer, (size_t)n);
        /* Edge-triggered: a short read has emptied the socket, unless the peer's end of stream is still behind it. */
        if (n < READ_SIZE && !(events & (EPOLLRDHUP | EPOLLHUP))) break;
    }
    if (R.churn && r->phase == PHASE_STREAM && r->ready) {
        R.finished++;
        reader_close(r);
    }
    if (R.churn && r->phase == PHASE_CLOSED && now_ns() < R.churn_until_ns) reader_open(r);
}

static void reader_open(struct reader *r) {
    *r = (struct reader){.fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), .index = r->index, .version = -1};
    if (r->fd < 0) die("socket");
    int one = 1;
    setsockopt(r->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (R.rcvbuf) setsockopt(r->fd, SOL_SOCKET, SO_RCVBUF, &R.rcvbuf, sizeof R.rcvbuf);
    if (R.sources > 1) { /* each address of 127.0.0.0/8 has its own 28,000 ports */
        unsigned k = R.source++ % R.sources;
        struct sockaddr_in from = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000000u | (1 + k / 250) << 8 | (1 + k % 250))};
        setsockopt(r->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
        if (bind(r->fd, (struct sockaddr *)&from, sizeof from) < 0) die("bind");
    }
    r->full = R.full_every && r->index % R.full_every == 0;
    r->phase = PHASE_CONNECTING;
    r->opened_ns = now_ns();
    R.pending++;
    if (connect(r->fd, (struct sockaddr *)&R.peer, sizeof R.peer) < 0 && errno != EINPROGRESS) {
        reader_failed(r, strerror(errno));
        return;
    }
    watch(r->fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, TAG_READER, r->index);
}

/* Opens what is due: by rate if one is given, else so many that no more than window are on their way. */
static void readers_arrive(void) {
    unsigned due = R.wanted;
    if (R.rate > 0) {
        double passed = (double)(now_ns() - R.arrivals_from_ns) / 1e9 * R.rate + 1;
        if (passed < due) due = (unsigned)passed;
    }
    while (R.opened < due && (R.rate > 0 || R.pending < R.window)) {
        R.all[R.opened].index = R.opened;
        reader_open(&R.all[R.opened++]);
    }
    if (R.opened == R.wanted && R.rate > 0) timer_set(R.arrivals, 0);
    tell_ready();
}

static void readers_mark(void) {
    R.bytes = R.reads = R.deliveries = R.snapshots = R.others = R.lost = R.repeated = R.resets = R.errors = R.rescans = R.finished = 0;
    R.failed = R.closed = 0;
    R.error_text[0] = 0;
    histogram_clear(&R.latency);
    histogram_clear(&R.setup);
    histogram_clear(&R.first);
    R.mark_ns = R.delivered_ns = now_ns();
    R.mark_cpu = cpu_seconds();
}

static void readers_close(void) {
    for (unsigned i = 0; i < R.opened; i++) reader_close(&R.all[i]);
    free(R.all);
    R.all = NULL;
    R.opened = R.wanted = R.pending = R.ready = 0;
    R.churn = false;
}

static void readers_start(const char *command) {
    readers_close();
    char *transport = json_string(command, "transport", "ws");
    free(R.host); free(R.path); free(R.headers); free(R.subscribe);
    R.host = json_string(command, "host", "127.0.0.1");
    R.path = json_string(command, "path", "/ws/jobs");
    R.headers = json_string(command, "headers", "");
    R.subscribe = json_string(command, "subscribe", "");
    R.first_number = (unsigned)json_number(command, "first", 0);
    R.step = (unsigned)json_number(command, "step", 1);
    R.turn = (unsigned)json_number(command, "turn", 0);
    R.websocket = !strcmp(transport, "ws");
    R.poll = !strcmp(transport, "poll");
    R.peer = address(R.host, (int)json_number(command, "port", 3000));
    R.wanted = (unsigned)json_number(command, "connections", 1);
    R.rate = json_number(command, "rate", 0);
    R.window = (unsigned)json_number(command, "window", 128);
    R.sources = (unsigned)json_number(command, "sources", 1);
    R.rcvbuf = (unsigned)json_number(command, "rcvbuf", 0);
    R.sample = (unsigned)json_number(command, "sample", 1);
    R.full_every = (unsigned)json_number(command, "full_every", 0);
    R.check = json_number(command, "check", 1) != 0;
    double churn = json_number(command, "churn_seconds", 0);
    R.all = calloc(R.wanted, sizeof *R.all);
    R.told_ready = false;
    R.churn = churn > 0;
    readers_mark();
    R.arrivals_from_ns = R.mark_ns;
    R.churn_until_ns = R.mark_ns + (uint64_t)(churn * 1e9);
    if (R.rate > 0) timer_set(R.arrivals, (uint64_t)(R.rate > 2000 ? 500000 : 1e9 / R.rate));
    readers_arrive();
    free(transport);
}

#endif
