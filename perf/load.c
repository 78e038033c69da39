/* Load client for the benchmarks: many raw-socket readers (WebSocket, SSE, long-poll) and HTTP publishers in one epoll loop.
 *
 * Build: gcc -O3 -std=gnu11 -o build/load load.c        (perf/load.py does it when the sources are newer)
 *
 * Controlled by one flat JSON object a line on stdin, answers by one a line on stdout:
 *   {"cmd":"start","transport":"ws"|"sse"|"poll","host","port","path","headers","subscribe","connections","rate","window","sources",
 *    "rcvbuf","sample","full_every","check","churn_seconds","first","step","turn"}   -> {"event":"ready",...} once all have their first
 *        snapshot or failed
 *        {n} in path and subscribe is first + index * step, so that each reader can watch something of its own; turn: the index begins
 *        anew after so many, so that they share (0: never)
 *        rate: arrivals per second (0: as many as answered, at most "window" on their way); sources: spread over that many
 *        addresses of 127.0.0.0/8; churn_seconds: each connection is closed after its first snapshot and opened anew until then
 *        (no "ready": watch "pending" in the report)
 *   {"cmd":"mark"}    sets all counters and histograms to zero               -> {"event":"marked"}
 *   {"cmd":"report"}  counters since the mark                                -> {"event":"report",...}
 *   {"cmd":"sample"}  the newest update on connection 0, as sent (hex)       -> {"event":"sample",...}
 *   {"cmd":"publish","host","port","job","jobs","fields","headers","connections","depth","batch","ndjson","rate","requests",
 *    "seconds","lockstep","spin","first","step","feed"}                       -> {"event":"published",...} at its end
 *        batch 0: one update a request to /api/v2/jobs/{job}/updates, else batches to /api/v2/updates; rate: updates per second,
 *        0 as fast as answered; jobs above 1: updates go in turn to {job}-{first}, {job}-{first + step}, ...,
 *        and {n} in fields is that number; lockstep: at most so many updates that have not reached every reader of this process;
 *        feed: "messages": over a WebSocket to /ws/jobs instead of HTTP, a message for each request. For servers that only pass
 *        messages on, whole messages to them: "lines": "<job>\t<message>\n", nothing is answered; "frames": the same as
 *        WebSocket messages to /feed; "post": one HTTP request each to /pub/<job>.
 *        spin: until the end this process looks for events without ever sleeping, so that nobody who sends to it has to wake it
 *   {"cmd":"close"}   closes the readers                                     -> {"event":"closed"}
 *   {"cmd":"quit"}
 */
#include <signal.h>
#include <stddef.h>

#include "common.h"
#include "publisher.h"
#include "readers.h"
#include "report.h"

static void command(const char *line) {
    char *name = json_string(line, "cmd", "");
    if (!strcmp(name, "start")) readers_start(line);
    else if (!strcmp(name, "publish")) publish_start(line);
    else if (!strcmp(name, "report")) readers_report();
    else if (!strcmp(name, "sample")) readers_sample();
    else if (!strcmp(name, "mark")) { readers_mark(); puts("{\"event\":\"marked\"}"); }
    else if (!strcmp(name, "close")) { readers_close(); puts("{\"event\":\"closed\"}"); }
    else if (!strcmp(name, "quit")) exit(0);
    else puts("{\"event\":\"error\",\"error\":\"unknown command\"}");
    free(name);
}

/* Commands that have come; the end of stdin ends the program. */
static void read_commands(void) {
    static char text[65536];
    static size_t length;
    ssize_t n = read(STDIN_FILENO, text + length, sizeof text - 1 - length);
    if (n <= 0) exit(0);
    length += (size_t)n;
    text[length] = 0;
    char *line = text, *end;
    while ((end = strchr(line, '\n'))) {
        *end = 0;
        if (end > line) command(line);
        line = end + 1;
    }
    length -= (size_t)(line - text);
    memmove(text, line, length);
}

int main(void) {
    static struct epoll_event events[512];
    signal(SIGPIPE, SIG_IGN);
    setvbuf(stdout, NULL, _IOFBF, 1 << 16);
    if ((epoll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0) die("epoll_create1");
    watch(STDIN_FILENO, EPOLLIN, TAG_STDIN, 0);
    R.arrivals = timer_open(TAG_ARRIVALS);
    P.schedule = timer_open(TAG_SCHEDULE);
    readers_mark();
    for (;;) {
        fflush(stdout);
        bool spin = P.active && P.spin;
        uint64_t before = spin ? now_ns() : 0;
        int n = epoll_wait(epoll_fd, events, 512, spin ? 0 : -1);
        if (n == 0) {
            P.idle_ns += now_ns() - before;
            continue;
        }
        if (n < 0 && errno != EINTR) die("epoll_wait");
        for (int i = 0; i < n; i++) {
            uint32_t index = (uint32_t)events[i].data.u64;
            switch ((enum tag)(events[i].data.u64 >> 32)) {
            case TAG_STDIN: read_commands(); break;
            case TAG_ARRIVALS: timer_clear(R.arrivals); readers_arrive(); break;
            case TAG_SCHEDULE: timer_clear(P.schedule); publish_more(); break;
            case TAG_READER: if (index < R.opened) reader_event(&R.all[index], events[i].events); break;
            case TAG_PUBLISHER: publisher_event(&P.all[index], events[i].events); break;
            }
        }
        if (R.opened < R.wanted && R.rate <= 0) readers_arrive();
        tell_ready();
        if (P.active && P.lockstep && lockstep_room()) publish_more();
    }
}
