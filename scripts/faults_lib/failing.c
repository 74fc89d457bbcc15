// Preloaded into the server: fails accept4, or epoll_ctl when it adds, with the errno that stands in a file.
// Two ints: the first is for accept4, the second for epoll_ctl; 0 is no failure.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static const volatile int *failing;

__attribute__((constructor)) static void open_switch(void) {
    static const int none[2];
    const char *path = getenv("FAULTS_SWITCH");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *mapped = file < 0 ? MAP_FAILED : mmap(NULL, sizeof none, PROT_READ, MAP_SHARED, file, 0);
    if (file >= 0)
        close(file);
    failing = mapped == MAP_FAILED ? none : mapped;
}

static int fail(int error) {
    errno = error;
    return -1;
}

int accept4(int listener, struct sockaddr *address, socklen_t *length, int flags) {
    if (failing[0])
        return fail(failing[0]);
    return (int)syscall(SYS_accept4, listener, address, length, flags);
}

int epoll_ctl(int epoll, int operation, int descriptor, struct epoll_event *event) {
    if (failing[1] && operation == EPOLL_CTL_ADD)
        return fail(failing[1]);
    return (int)syscall(SYS_epoll_ctl, epoll, operation, descriptor, event);
}
