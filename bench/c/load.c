// The load generator: opens connections and sends messages to be echoed, the same for every server.
//
//   load FIRST_PORT PORTS
//
// It reads one command per line from standard input and answers each with one line:
//
//   open N              opens N more connections, at most 256 concurrently, on the ports in turn
//   echo N EACH FILE    sends EACH messages on each of N connections, evenly spread, one at a time per
//                       connection; writes the latencies to FILE as 32-bit nanoseconds
//   send N              sends one message on each of N connections, evenly spread
//   receive N           waits until these have been echoed
//   close               resets all connections
//
// A message is 64 bytes that identify its connection; the echo is compared with it.
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 1024, IN_FLIGHT = 256, CONNECTIONS_MAX = 65536, MESSAGE = 64, WAIT_MS = 60000 };

static int epoll, first_port, ports;
static int fds[CONNECTIONS_MAX], opened;
static uint64_t sent_at[CONNECTIONS_MAX];
static int left[CONNECTIONS_MAX];
static struct epoll_event events[EVENTS];

static void die(const char *what) { perror(what); exit(1); }

static void fail(const char *what) { fprintf(stderr, "load: %s\n", what); exit(1); }

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static int wait_events(void) {
    int count = epoll_wait(epoll, events, EVENTS, WAIT_MS);
    if (count == 0) fail("the server has been silent for 60 s");
    if (count < 0 && errno != EINTR) die("epoll_wait");
    return count;
}

static void control(int operation, int index, unsigned interest) {
    struct epoll_event event = { .events = interest, .data.u32 = index };
    if (epoll_ctl(epoll, operation, fds[index], &event)) die("epoll_ctl");
}

static void open_one(int index) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    if (fd < 0) die("socket");
    struct linger reset = { 1, 0 };
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct sockaddr_in address = { .sin_family = AF_INET };
    address.sin_port = htons(first_port + index % ports);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) die("connect");
    fds[index] = fd;
    control(EPOLL_CTL_ADD, index, EPOLLOUT);
}

static void open_all(int n) {
    if (opened + n > CONNECTIONS_MAX) fail("too many connections");
    int next = opened, end = opened + n, connected = opened;
    while (connected < end) {
        while (next < end && next - connected < IN_FLIGHT) open_one(next++);
        for (int i = wait_events() - 1; i >= 0; i--) {
            if (events[i].events & (EPOLLERR | EPOLLHUP)) fail("a connection was not accepted");
            control(EPOLL_CTL_MOD, events[i].data.u32, EPOLLIN);
            connected++;
        }
    }
    opened = end;
}

// The index of the i-th of n connections, evenly spread over all.
static int spread(int i, int n) { return (int)((int64_t)i * opened / n); }

static void message(int index, char *bytes) {
    memset(bytes, 'a' + index % 26, MESSAGE);
    memcpy(bytes, &index, sizeof index);
}

static void send_one(int index) {
    char bytes[MESSAGE];
    message(index, bytes);
    sent_at[index] = now();
    if (send(fds[index], bytes, MESSAGE, MSG_NOSIGNAL) != MESSAGE) die("send");
}

static void receive_one(int index) {
    char bytes[4096], wanted[MESSAGE];
    ssize_t size = recv(fds[index], bytes, sizeof bytes, 0);
    message(index, wanted);
    if (size != MESSAGE || memcmp(bytes, wanted, MESSAGE)) fail("an echo differs from its message");
}

static void check_active(int n) {
    if (n < 1 || n > opened) fail("there are fewer connections");
}

static long echo(int n, int each, const char *path) {
    check_active(n);
    long total = (long)n * each, done = 0;
    uint32_t *latencies = malloc(total * sizeof *latencies);
    if (!latencies) die("malloc");
    for (int i = 0; i < n; i++) {
        left[spread(i, n)] = each;
        send_one(spread(i, n));
    }
    while (done < total) {
        int count = wait_events();
        for (int i = 0; i < count; i++) {
            int index = events[i].data.u32;
            receive_one(index);
            uint64_t latency = now() - sent_at[index];
            latencies[done++] = latency > UINT32_MAX ? UINT32_MAX : latency;
            if (--left[index]) send_one(index);
        }
    }
    FILE *file = fopen(path, "w");
    if (!file || fwrite(latencies, sizeof *latencies, total, file) != (size_t)total || fclose(file)) die(path);
    free(latencies);
    return total;
}

static void receive_all(int n) {
    check_active(n);
    for (int done = 0; done < n;) {
        int count = wait_events();
        for (int i = 0; i < count; i++) receive_one(events[i].data.u32);
        done += count > 0 ? count : 0;
    }
}

static void obey(const char *line) {
    int n = 0, each = 0;
    long done = 0;
    char path[4096];
    uint64_t begin = now();
    if (sscanf(line, "open %d", &n) == 1) { open_all(n); done = n; }
    else if (sscanf(line, "echo %d %d %4095s", &n, &each, path) == 3) done = echo(n, each, path);
    else if (sscanf(line, "send %d", &n) == 1) {
        check_active(n);
        for (int i = 0; i < n; i++) send_one(spread(i, n));
        done = n;
    } else if (sscanf(line, "receive %d", &n) == 1) { receive_all(n); done = n; }
    else if (!strncmp(line, "close", 5)) {
        for (done = 0; done < opened; done++) close(fds[done]);
        opened = 0;
    } else fail("no such command");
    printf("%ld %llu\n", done, (unsigned long long)(now() - begin));
    fflush(stdout);
}

int main(int argc, char **argv) {
    if (argc < 3) return fputs("load FIRST_PORT PORTS\n", stderr), 2;
    first_port = atoi(argv[1]);
    ports = atoi(argv[2]);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    char line[8192];
    while (fgets(line, sizeof line, stdin)) obey(line);
    return 0;
}
