// The floor: a minimal epoll server, without any state per connection except the descriptor.
//
//   floor FIRST_PORT PORTS [ACCEPTS_PER_WAKE [edge]]
//
// The third and the fourth argument are for the prototypes: the number of connections that are accepted
// from one listener before other events are served, and edge-triggered instead of level-triggered
// connections (a read shorter than the buffer has emptied the socket, so no second read is needed).
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { EVENTS = 1024, BACKLOG = 4096 };

static char buffer[65536];

static void die(const char *what) { perror(what); exit(1); }

static void watch(int epoll, int fd, unsigned events) {
    struct epoll_event event = { .events = events, .data.fd = fd };
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)) die("epoll_ctl");
}

static int listener(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, BACKLOG)) die("listen");
    return fd;
}

static void accept_some(int epoll, int fd, int most, unsigned events) {
    for (int n = 0; n < most; n++) {
        int new = accept4(fd, 0, 0, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (new < 0) return;
        watch(epoll, new, events);
    }
}

static void echo(int fd) {
    ssize_t size;
    do {
        size = recv(fd, buffer, sizeof buffer, 0);
        if (size > 0 && send(fd, buffer, size, MSG_NOSIGNAL) != size) die("send");
    } while (size == sizeof buffer);
    if (size == 0 || (size < 0 && errno != EAGAIN)) close(fd);
}

int main(int argc, char **argv) {
    if (argc < 3) return fputs("floor FIRST_PORT PORTS [ACCEPTS_PER_WAKE [edge]]\n", stderr), 2;
    int first_port = atoi(argv[1]), ports = atoi(argv[2]);
    int most = argc > 3 ? atoi(argv[3]) : 64;
    unsigned interest = EPOLLIN | (argc > 4 ? EPOLLET : 0);
    int epoll = epoll_create1(EPOLL_CLOEXEC), first = -1, last = -1;
    for (int i = 0; i < ports; i++) {
        last = listener(first_port + i);
        if (first < 0) first = last;
        watch(epoll, last, EPOLLIN);
    }
    puts("ready");
    fflush(stdout);
    static struct epoll_event events[EVENTS];
    for (;;) {
        int count = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd >= first && fd <= last) accept_some(epoll, fd, most, interest);
            else echo(fd);
        }
    }
}
