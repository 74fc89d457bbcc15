// The floor: the least that a C program can do and still hold the connections.
//
// One source, two programs by the name it is started under (c1000k-server, c1000k-client), with
// the few flags that the lab passes. No state per connection but the descriptor itself. What the
// kernel spends under it is what no reactor can go below; docs/lab.md says how to run it.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PORTS = 100, FIRST_PORT = 9900, EVENTS = 256, IN_FLIGHT = 1024 };

static volatile sig_atomic_t stopping;
static char buffer[65536];

static void stop(int signal) { (void)signal; stopping = 1; }

static void die(const char *what) { perror(what); exit(1); }

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static const char *option(int argc, char **argv, const char *name, const char *otherwise) {
    for (int i = 1; i + 1 < argc; i++)
        if (!strcmp(argv[i], name)) return argv[i + 1];
    return otherwise;
}

static void watch(int epoll, int fd, unsigned events) {
    struct epoll_event event = { .events = events, .data.fd = fd };
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)) die("epoll_ctl");
}

static int listener(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) die("listen");
    return fd;
}

static long rss_peak_bytes(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss * 1024;
}

static double seconds(struct timeval time) { return time.tv_sec + time.tv_usec / 1e6; }

static void server_record(const char *path, long accepted, long peak, long open) {
    FILE *file = fopen(path, "w");
    if (!file) die(path);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    fprintf(file,
            "{\"schema\":\"c1000k.server/1\",\"accepted\":%ld,\"peak\":%ld,\"open\":%ld,"
            "\"refused\":0,\"closed\":%ld,\"stale_events\":0,\"accept_errors\":{},\"bytes_in\":0,"
            "\"bytes_out\":0,\"user_bytes_per_connection\":null,"
            "\"kernel_bytes_per_connection\":null,\"rss_peak_bytes\":%ld,"
            "\"cpu_user_seconds\":%f,\"cpu_system_seconds\":%f}\n",
            accepted, peak, open, accepted - open, rss_peak_bytes(), seconds(usage.ru_utime),
            seconds(usage.ru_stime));
    fclose(file);
}

static int serve(const char *json) {
    int epoll = epoll_create1(0), first = -1, last = -1;
    for (int i = 0; i < PORTS; i++) {
        last = listener(FIRST_PORT + i);
        if (first < 0) first = last;
        watch(epoll, last, EPOLLIN);
    }
    puts("ready");
    long accepted = 0, open = 0, peak = 0;
    struct epoll_event events[EVENTS];
    while (!stopping) {
        int count = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd, new;
            if (fd >= first && fd <= last) {
                for (int n = 0; n < 64 && (new = accept4(fd, 0, 0, SOCK_NONBLOCK)) >= 0; n++) {
                    watch(epoll, new, EPOLLIN | EPOLLRDHUP);
                    accepted++;
                    if (++open > peak) peak = open;
                }
            } else {
                ssize_t size = recv(fd, buffer, sizeof buffer, 0);
                if (size > 0) { send(fd, buffer, size, MSG_NOSIGNAL); continue; }
                if (size < 0 && errno == EAGAIN) continue;
                close(fd);
                open--;
            }
        }
    }
    server_record(json, accepted, peak, open);
    return 0;
}

struct flood { int epoll, first_fd, last_fd; long target, opened, attempted, done, failed, in_flight; };

static void open_one(struct flood *flood, const char *ip) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0) die("socket");
    struct linger reset = { 1, 0 };
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    struct sockaddr_in address = { .sin_family = AF_INET };
    address.sin_port = htons(FIRST_PORT + flood->attempted % PORTS);
    inet_pton(AF_INET, ip, &address.sin_addr);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) die("connect");
    watch(flood->epoll, fd, EPOLLOUT);
    if (!flood->attempted) flood->first_fd = fd;
    flood->last_fd = fd;
    flood->attempted++;
    flood->in_flight++;
}

static void greet(struct flood *flood, int fd) {
    struct epoll_event event = { .events = EPOLLIN, .data.fd = fd };
    char hello[64];
    int size = snprintf(hello, sizeof hello, "Hello Server, connections num:%d\n", fd);
    if (send(fd, hello, size, MSG_NOSIGNAL) != size) die("send");
    if (epoll_ctl(flood->epoll, EPOLL_CTL_MOD, fd, &event)) die("epoll_ctl");
}

static void advance(struct flood *flood, struct epoll_event *event) {
    int fd = event->data.fd;
    if (event->events & EPOLLOUT && !(event->events & EPOLLERR)) { greet(flood, fd); return; }
    flood->in_flight--;
    if (recv(fd, buffer, sizeof buffer, 0) > 0) { flood->done++; return; }
    flood->failed++;
    epoll_ctl(flood->epoll, EPOLL_CTL_DEL, fd, 0);
}

static void turn(struct flood *flood, double *shown) {
    struct epoll_event events[EVENTS];
    int count = epoll_wait(flood->epoll, events, EVENTS, 1000);
    for (int i = 0; i < count; i++) advance(flood, &events[i]);
    if (now() - *shown < 1) return;
    *shown = now();
    printf("opened %ld of %ld\n", flood->done, flood->target);
}

static long echo_all(struct flood *flood, double *shown) {
    long before = flood->done;
    for (int fd = flood->first_fd; fd <= flood->last_fd && !stopping; fd++) {
        while (flood->in_flight >= IN_FLIGHT && !stopping) turn(flood, shown);
        if (send(fd, "again", 5, MSG_NOSIGNAL) == 5) flood->in_flight++;
    }
    while (flood->in_flight > 0 && !stopping) turn(flood, shown);
    return flood->done - before;
}

static void client_record(const char *path, struct flood *flood, long established, long verified, double ramp) {
    FILE *file = fopen(path, "w");
    if (!file) die(path);
    fprintf(file,
            "{\"schema\":\"c1000k.client/1\",\"target\":%ld,\"attempted\":%ld,\"established\":%ld,"
            "\"verified\":%ld,\"failed\":%ld,\"failures\":{},\"lost\":%ld,\"limit\":null,"
            "\"ramp_seconds\":%f,\"connects_per_second\":%f,\"connect_latency_us\":{\"p50\":0,"
            "\"p90\":0,\"p99\":0,\"p999\":0,\"max\":0},\"verdict\":\"%s\"}\n",
            flood->target, flood->attempted, established, verified, flood->failed,
            established - verified, ramp, established / ramp,
            verified == flood->target ? "reached" : "short");
    fclose(file);
}

static int flood(const char *ip, long target, int hold_seconds, const char *json) {
    struct flood flood = { .epoll = epoll_create1(0), .target = target };
    double start = now(), shown = start;
    while (flood.done + flood.failed < target && !stopping) {
        while (flood.in_flight < IN_FLIGHT && flood.attempted < target) open_one(&flood, ip);
        turn(&flood, &shown);
    }
    double ramp = now() - start;
    long established = flood.done;
    printf("holding %ld connections for %ds\n", established, hold_seconds);
    for (double end = now() + hold_seconds; now() < end && !stopping;) usleep(100000);
    long verified = echo_all(&flood, &shown);
    printf("%ld of %ld, verified %ld\n", established, target, verified);
    client_record(json, &flood, established, verified, ramp);
    return verified == target ? 0 : 1;
}

int main(int argc, char **argv) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    setvbuf(stdout, 0, _IOLBF, 0);
    signal(SIGINT, stop);
    signal(SIGTERM, stop);
    const char *json = option(argc, argv, "--json", "/dev/stdout");
    if (strstr(argv[0], "c1000k-server")) return serve(json);
    if (argc < 3) return fputs("c1000k-client IP PORT -c N [--hold Ns] [--json PATH]\n", stderr), 2;
    return flood(argv[1], atol(option(argc, argv, "-c", "1000000")), atoi(option(argc, argv, "--hold", "5s")), json);
}
