/* The bare loop in C: `send` for each reader of a channel, behind a canned handshake. It understands nothing.
 * Usage: loop --port P --feed F. Readers that cannot take a message at once make it wait for them. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CHANNELS = 512, DESCRIPTORS = 1 << 16, FEED_ROOM = 1 << 20 };
enum kind { FREE, READERS_DOOR, FEED_DOOR, FEED, FRESH, READER };

static struct channel { char name[64]; bool events; int *readers, number, room; } channels[CHANNELS];
static struct { enum kind kind; int channel, place; } all[DESCRIPTORS];
static int used, epoll_fd;
static char feed[FEED_ROOM];
static size_t feed_length;

static int find(const char *name, size_t length, bool events) {
    for (int i = 0; i < used; i++)
        if (channels[i].events == events && strlen(channels[i].name) == length && !memcmp(channels[i].name, name, length)) return i;
    if (used == CHANNELS || length >= sizeof channels->name) exit(1);
    memcpy(channels[used].name, name, length);
    channels[used].events = events;
    return used++;
}

static void send_whole(int fd, const char *data, size_t length) {
    while (length) {
        ssize_t n = send(fd, data, length, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) { poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, -1); continue; }
        if (n < 0) return;
        data += n;
        length -= (size_t)n;
    }
}

static void publish(const char *channel, size_t channel_length, const char *message, size_t length) {
    static char data[FEED_ROOM + 64];
    for (int events = 0; events < 2; events++) {
        struct channel *c = &channels[find(channel, channel_length, events)];
        if (!c->number) continue;
        size_t n;
        if (events) n = (size_t)sprintf(data, "%zx\r\ndata: %.*s\n\n\r\n", length + 8, (int)length, message);
        else if (length < 126) n = 2, data[1] = (char)length;
        else n = 4, data[1] = 126, data[2] = (char)(length >> 8), data[3] = (char)length;
        if (!events) { data[0] = (char)0x81; memcpy(data + n, message, length); n += length; }
        for (int i = 0; i < c->number; i++) send_whole(c->readers[i], data, n);
    }
}

static void feed_event(int fd) {
    ssize_t n = recv(fd, feed + feed_length, FEED_ROOM - feed_length, 0);
    if (n <= 0) { if (!n || errno != EAGAIN) { close(fd); all[fd].kind = FREE; feed_length = 0; } return; }
    feed_length += (size_t)n;
    char *line = feed, *end;
    while ((end = memchr(line, '\n', feed_length - (size_t)(line - feed)))) {
        char *tab = memchr(line, '\t', (size_t)(end - line));
        if (tab) publish(line, (size_t)(tab - line), tab + 1, (size_t)(end - tab - 1));
        line = end + 1;
    }
    feed_length -= (size_t)(line - feed);
    memmove(feed, line, feed_length);
}

static void reader_event(int fd) {
    static char request[65536];
    ssize_t n = recv(fd, request, sizeof request - 1, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        if (all[fd].kind == READER) {
            struct channel *c = &channels[all[fd].channel];
            c->readers[all[fd].place] = c->readers[--c->number];
            all[c->readers[all[fd].place]].place = all[fd].place;
        }
        all[fd].kind = FREE;
        close(fd);
        return;
    }
    if (all[fd].kind == READER) return;
    request[n] = 0;
    bool events = !strncmp(request, "GET /sse/", 9);
    char *name = request + (events ? 9 : 8), *end = strchr(name, ' ');
    if (!end) exit(1);
    int channel = find(name, (size_t)(end - name), events);
    const char *answer = events
        ? "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n1b\r\ndata: {\"type\":\"snapshot\"}\n\n\r\n"
        : "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
          "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n\x81\x15{\"type\":\"subscribed\"}";
    send_whole(fd, answer, strlen(answer));
    struct channel *c = &channels[channel];
    if (c->number == c->room) c->readers = realloc(c->readers, sizeof *c->readers * (size_t)(c->room = 2 * c->room + 16));
    all[fd].kind = READER;
    all[fd].channel = channel;
    all[fd].place = c->number;
    c->readers[c->number++] = fd;
}

static void watch(int fd, enum kind kind) {
    if (fd >= DESCRIPTORS) exit(1);
    all[fd].kind = kind;
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &(struct epoll_event){.events = EPOLLIN, .data.fd = fd});
}

static void open_door(int port, enum kind kind) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 4096)) { perror("loop"); exit(1); }
    watch(fd, kind);
}

int main(int count, char **arguments) {
    static struct epoll_event events[512];
    if (count != 5) return 2;
    signal(SIGPIPE, SIG_IGN);
    epoll_fd = epoll_create1(0);
    open_door(atoi(arguments[2]), READERS_DOOR);
    open_door(atoi(arguments[4]), FEED_DOOR);
    for (;;) {
        int n = epoll_wait(epoll_fd, events, 512, -1);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd, one = 1;
            if (all[fd].kind == READERS_DOOR || all[fd].kind == FEED_DOOR) {
                int fresh = accept4(fd, NULL, NULL, SOCK_NONBLOCK);
                if (fresh < 0) continue;
                setsockopt(fresh, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                watch(fresh, all[fd].kind == FEED_DOOR ? FEED : FRESH);
            } else if (all[fd].kind == FEED) feed_event(fd);
            else if (all[fd].kind != FREE) reader_event(fd);
        }
    }
}
