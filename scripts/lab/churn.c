/* The peers of a soak: holds N connections to 100 ports (or --ports), and each second closes and opens
 * --churn of them, the older ones first, every other one by a reset.
 *
 *     churn ADDRESS FIRST_PORT N SECONDS [--ports N] [--churn N] [--rate N]
 *
 * Each connection says something when it opens and again at half of its life, and compares the echo. One
 * slot in ten is never closed; one in fifty falls silent after its first echo, and the server's idle
 * timeout must take it; it is to be longer than half a life, which is N / churn / 2 seconds. A line a
 * second: seconds, open, opened, closed, by idle timeout, lost, echoes, and the longest wait for an echo
 * in milliseconds. In the end each must echo once more, and then all are reset. The last line is JSON.
 * Exit code: 0 all was as it must be, 1 it was not, 2 wrong usage.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { FREE, CONNECTING, WAITING, OPEN };
enum { PERMANENT_EVERY = 10, SILENT_EVERY = 50, IN_FLIGHT_MAX = 4000, PATIENCE_SECONDS = 120 };

struct slot {
    int descriptor;
    unsigned char state, silent;
    unsigned short heard;
    unsigned int life; /* told in each message, so that an echo of another life is wrong */
    float asked_at;
};

static struct slot *slots;
static int total, ports = 100, churn_per_second = 1000, ramp_per_second = 10000, poller;
static struct sockaddr_in server;
static long open_now, opened, closed, timed_out, lost, wrong, echoes, in_flight;
static double began, wait_max;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void die(const char *what) {
    fprintf(stderr, "churn: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int message(struct slot *slot, char *text) {
    return snprintf(text, 64, "life %u of connection %ld, still there?", slot->life, (long)(slot - slots));
}

static void forget(struct slot *slot) {
    if (slot->state == CONNECTING || slot->state == WAITING)
        in_flight--;
    if (slot->state == WAITING || slot->state == OPEN)
        open_now--;
    close(slot->descriptor); /* and so it leaves epoll */
    slot->state = FREE;
    slot->silent = 0;
}

static void lose(struct slot *slot, const char *why) {
    if (lost++ < 20)
        fprintf(stderr, "churn: lost connection %ld at %.1f s: %s\n", (long)(slot - slots), now() - began, why);
    forget(slot);
}

static void start(struct slot *slot);

/* The server has closed it: as it must where nothing was said for long. */
static void end(struct slot *slot, const char *why) {
    if (!slot->silent) {
        lose(slot, why);
        return;
    }
    timed_out++;
    forget(slot);
    start(slot);
}

static void ask(struct slot *slot) {
    char text[64];
    int length = message(slot, text);
    if (slot->state == OPEN)
        in_flight++;
    slot->state = WAITING;
    slot->heard = 0;
    slot->asked_at = now() - began;
    if (send(slot->descriptor, text, length, MSG_NOSIGNAL) != length)
        end(slot, strerror(errno));
}

static void start(struct slot *slot) {
    struct epoll_event event = {.events = EPOLLOUT, .data.u32 = slot - slots};
    int one = 1;
    slot->descriptor = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (slot->descriptor < 0)
        die("socket");
    setsockopt(slot->descriptor, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct sockaddr_in address = server;
    address.sin_port = htons(ntohs(server.sin_port) + (slot - slots) % ports);
    slot->state = CONNECTING;
    slot->life++;
    slot->asked_at = now() - began;
    in_flight++;
    if (connect(slot->descriptor, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS) {
        lose(slot, strerror(errno));
        return;
    }
    if (epoll_ctl(poller, EPOLL_CTL_ADD, slot->descriptor, &event) < 0)
        die("epoll_ctl");
}

static void established(struct slot *slot) {
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = slot - slots};
    int error = 0;
    socklen_t length = sizeof error;
    getsockopt(slot->descriptor, SOL_SOCKET, SO_ERROR, &error, &length);
    if (error) {
        lose(slot, strerror(error));
        return;
    }
    epoll_ctl(poller, EPOLL_CTL_MOD, slot->descriptor, &event);
    opened++;
    open_now++;
    slot->state = WAITING;
    ask(slot);
}

static void hear(struct slot *slot) {
    char said[64], heard[128];
    int length = message(slot, said);
    ssize_t count = recv(slot->descriptor, heard, sizeof heard, 0);
    if (count < 0 && errno == EAGAIN)
        return;
    if (count <= 0) {
        end(slot, count ? strerror(errno) : "closed by the server");
        return;
    }
    if (slot->heard + count > length || memcmp(heard, said + slot->heard, count)) {
        wrong++;
        lose(slot, "a wrong echo");
        return;
    }
    slot->heard += count;
    if (slot->heard < length)
        return;
    double waited = now() - began - slot->asked_at;
    if (waited > wait_max)
        wait_max = waited;
    slot->state = OPEN;
    in_flight--;
    echoes++;
}

static void take_events(int milliseconds) {
    struct epoll_event events[512];
    int count = epoll_wait(poller, events, 512, milliseconds);
    for (int i = 0; i < count; i++) {
        struct slot *slot = &slots[events[i].data.u32];
        if (slot->state == CONNECTING)
            established(slot);
        else if (slot->state != FREE)
            hear(slot);
    }
}

static void show(void) {
    static double shown;
    double seconds = now() - began;
    if (seconds - shown < 1)
        return;
    shown = seconds;
    printf("%.1f %ld %ld %ld %ld %ld %ld %.1f\n", seconds, open_now, opened, closed, timed_out, lost, echoes, wait_max * 1000);
    fflush(stdout);
    wait_max = 0;
}

static void ramp(void) {
    double started = now();
    for (int next = 0; next < total || in_flight;) {
        double due = (now() - started) * ramp_per_second;
        while (next < total && next < due && in_flight < IN_FLIGHT_MAX)
            start(&slots[next++]);
        take_events(1);
        show();
    }
}

static void reset(struct slot *slot) {
    struct linger linger = {1, 0};
    setsockopt(slot->descriptor, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
}

/* The next slot's turn: whoever was in it leaves, and another comes. */
static int turn(struct slot *slot) {
    int number = slot - slots;
    if (slot->state != OPEN || slot->silent)
        return 0;
    if (number % PERMANENT_EVERY == 0) {
        ask(slot);
        return 0;
    }
    if (closed++ % 2)
        reset(slot);
    forget(slot);
    start(slot);
    return 1;
}

/* At half of its life: it speaks, or falls silent for good. */
static void half(struct slot *slot) {
    int number = slot - slots;
    if (slot->state != OPEN || slot->silent)
        return;
    if (number % SILENT_EVERY == 1)
        slot->silent = 1;
    else
        ask(slot);
}

static void churn(double seconds) {
    double started = now(), turned = 0;
    int place = 0;
    while (now() - started < seconds) {
        double due = (now() - started) * churn_per_second;
        for (int most = 100; turned < due && in_flight < IN_FLIGHT_MAX && most > 0; most--) {
            turned += turn(&slots[place]);
            half(&slots[(place + total / 2) % total]);
            place = (place + 1) % total;
        }
        take_events(1);
        show();
    }
}

/* Each one speaks once more, also those that fell silent and are not closed yet. */
static long prove(void) {
    long proven = 0;
    double deadline;
    for (int i = 0; i < total; i++) {
        if (slots[i].state == OPEN)
            ask(&slots[i]);
        for (deadline = now() + PATIENCE_SECONDS; in_flight >= IN_FLIGHT_MAX && now() < deadline;)
            take_events(10);
    }
    for (deadline = now() + PATIENCE_SECONDS; in_flight && now() < deadline;)
        take_events(10);
    for (int i = 0; i < total; i++)
        proven += slots[i].state == OPEN;
    return proven;
}

/* A few at a time: a reset is sent once, and the kernel's queue of loopback packets holds a thousand. */
static void leave(void) {
    for (int i = 0; i < total; i++) {
        if (slots[i].state == FREE)
            continue;
        reset(&slots[i]);
        forget(&slots[i]);
        if (i % 64 == 0)
            usleep(1000);
    }
}

static void usage(void) {
    fprintf(stderr, "churn: wants ADDRESS FIRST_PORT N SECONDS [--ports N] [--churn N] [--rate N]\n");
    exit(2);
}

int main(int argc, char **argv) {
    if (argc < 5 || argc % 2 == 0 || inet_pton(AF_INET, argv[1], &server.sin_addr) != 1)
        usage();
    server.sin_family = AF_INET;
    server.sin_port = htons(atoi(argv[2]));
    total = atoi(argv[3]);
    for (int i = 5; i < argc; i += 2) {
        int *setting = !strcmp(argv[i], "--ports") ? &ports : !strcmp(argv[i], "--churn") ? &churn_per_second
            : !strcmp(argv[i], "--rate") ? &ramp_per_second : NULL;
        if (!setting || (*setting = atoi(argv[i + 1])) <= 0)
            usage();
    }
    if (total <= 0 || atof(argv[4]) <= 0)
        usage();
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    slots = calloc(total, sizeof *slots);
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (!slots || poller < 0)
        die("no room");
    began = now();
    ramp();
    double ramped = now() - began;
    printf("churning after %.1f s\n", ramped);
    fflush(stdout);
    churn(atof(argv[4]));
    double churned = now() - began - ramped;
    long held = open_now, proven = prove(), opened_all = opened, opened_meanwhile = opened - total;
    leave();
    printf("{\"connections\": %d, \"ramp_seconds\": %.1f, \"seconds\": %.1f, \"opened\": %ld, "
           "\"opened_per_second\": %.1f, \"closed\": %ld, \"closed_per_second\": %.1f, \"timed_out\": %ld, "
           "\"held\": %ld, \"proven\": %ld, \"lost\": %ld, \"wrong\": %ld, \"echoes\": %ld}\n",
           total, ramped, churned, opened_all, opened_meanwhile / churned, closed,
           (closed + timed_out) / churned, timed_out, held, proven, lost, wrong, echoes);
    return lost || wrong || proven != total;
}
