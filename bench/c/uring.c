// The same server on io_uring, as a prototype: multishot accept and receive, buffers provided by a
// ring, and submissions that are batched with the wait. It uses the kernel interface directly, without
// a library.
//
//   uring FIRST_PORT PORTS
#define _GNU_SOURCE
#include <errno.h>
#include <linux/io_uring.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ENTRIES = 4096, COMPLETIONS = 65536, BACKLOG = 4096, BUFFERS = 4096, BUFFER = 1024, GROUP = 0 };
enum { ACCEPT = 1, RECEIVE, SEND };

static int ring;
static struct io_uring_sqe *sqes;
static struct io_uring_cqe *cqes;
static unsigned *sq_head, *sq_tail, *cq_head, *cq_tail;
static unsigned sq_mask, cq_mask, unsubmitted;
static struct io_uring_buf_ring *buffers;
static char memory[BUFFERS][BUFFER];

static void die(const char *what) { perror(what); exit(1); }

static void give(int id) {
    unsigned short tail = buffers->tail;
    struct io_uring_buf *buffer = &buffers->bufs[tail & (BUFFERS - 1)];
    buffer->addr = (unsigned long)memory[id];
    buffer->len = BUFFER;
    buffer->bid = id;
    __atomic_store_n(&buffers->tail, tail + 1, __ATOMIC_RELEASE);
}

static void set_up(void) {
    struct io_uring_params params = {
        .flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_CQSIZE,
        .cq_entries = COMPLETIONS,
    };
    ring = syscall(SYS_io_uring_setup, ENTRIES, &params);
    if (ring < 0) die("io_uring_setup");
    // Completions and the array of submissions share one mapping; the array is its end.
    size_t size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    char *rings = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQ_RING);
    sqes = mmap(0, params.sq_entries * sizeof *sqes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring,
                IORING_OFF_SQES);
    if (rings == MAP_FAILED || sqes == MAP_FAILED) die("mmap");
    sq_head = (unsigned *)(rings + params.sq_off.head);
    sq_tail = (unsigned *)(rings + params.sq_off.tail);
    sq_mask = *(unsigned *)(rings + params.sq_off.ring_mask);
    // Entry i of the array of submissions is always submission i.
    for (unsigned i = 0; i <= sq_mask; i++) ((unsigned *)(rings + params.sq_off.array))[i] = i;
    cq_head = (unsigned *)(rings + params.cq_off.head);
    cq_tail = (unsigned *)(rings + params.cq_off.tail);
    cq_mask = *(unsigned *)(rings + params.cq_off.ring_mask);
    cqes = (struct io_uring_cqe *)(rings + params.cq_off.cqes);
    buffers = mmap(0, BUFFERS * sizeof(struct io_uring_buf), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffers == MAP_FAILED) die("mmap");
    struct io_uring_buf_reg registration = {
        .ring_addr = (unsigned long)buffers, .ring_entries = BUFFERS, .bgid = GROUP };
    if (syscall(SYS_io_uring_register, ring, IORING_REGISTER_PBUF_RING, &registration, 1)) die("io_uring_register");
    for (int id = 0; id < BUFFERS; id++) give(id);
}

static void enter(unsigned wait) {
    unsigned flags = wait ? IORING_ENTER_GETEVENTS : 0;
    int taken = syscall(SYS_io_uring_enter, ring, unsubmitted, wait, flags, 0, 0);
    if (taken < 0 && errno != EINTR) die("io_uring_enter");
    if (taken > 0) unsubmitted -= taken;
}

static struct io_uring_sqe *ask(int operation, int fd, int what, unsigned buffer) {
    unsigned tail = *sq_tail;
    while (tail - __atomic_load_n(sq_head, __ATOMIC_ACQUIRE) > sq_mask) enter(0);
    struct io_uring_sqe *sqe = &sqes[tail & sq_mask];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = operation;
    sqe->fd = fd;
    sqe->user_data = (unsigned long long)what << 60 | (unsigned long long)buffer << 32 | (unsigned)fd;
    __atomic_store_n(sq_tail, tail + 1, __ATOMIC_RELEASE);
    unsubmitted++;
    return sqe;
}

static void ask_accept(int fd) {
    struct io_uring_sqe *sqe = ask(IORING_OP_ACCEPT, fd, ACCEPT, 0);
    sqe->ioprio = IORING_ACCEPT_MULTISHOT;
    sqe->accept_flags = SOCK_CLOEXEC;
}

static void ask_receive(int fd) {
    struct io_uring_sqe *sqe = ask(IORING_OP_RECV, fd, RECEIVE, 0);
    // A new connection usually has no input yet, so the first receive waits for a report of input.
    sqe->ioprio = IORING_RECV_MULTISHOT | IORING_RECVSEND_POLL_FIRST;
    sqe->flags = IOSQE_BUFFER_SELECT;
    sqe->buf_group = GROUP;
}

static void ask_send(int fd, unsigned buffer, unsigned size) {
    struct io_uring_sqe *sqe = ask(IORING_OP_SEND, fd, SEND, buffer);
    sqe->addr = (unsigned long)memory[buffer];
    sqe->len = size;
    sqe->msg_flags = MSG_NOSIGNAL | MSG_WAITALL;
}

static void complete(const struct io_uring_cqe *cqe) {
    int fd = (int)(cqe->user_data & 0xffffffff);
    switch (cqe->user_data >> 60) {
    case ACCEPT:
        if (cqe->res >= 0) ask_receive(cqe->res);
        if (!(cqe->flags & IORING_CQE_F_MORE)) ask_accept(fd);
        return;
    case RECEIVE:
        if (cqe->res > 0) ask_send(fd, cqe->flags >> IORING_CQE_BUFFER_SHIFT, cqe->res);
        else if (cqe->res != -ENOBUFS) { close(fd); return; }
        if (!(cqe->flags & IORING_CQE_F_MORE)) ask_receive(fd);
        return;
    case SEND:
        give(cqe->user_data >> 32 & 0xffff);
    }
}

static int listener(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, BACKLOG)) die("listen");
    return fd;
}

int main(int argc, char **argv) {
    if (argc < 3) return fputs("uring FIRST_PORT PORTS\n", stderr), 2;
    set_up();
    for (int i = 0; i < atoi(argv[2]); i++) ask_accept(listener(atoi(argv[1]) + i));
    puts("ready");
    fflush(stdout);
    for (;;) {
        enter(1);
        unsigned head = *cq_head, tail = __atomic_load_n(cq_tail, __ATOMIC_ACQUIRE);
        for (; head != tail; head++) complete(&cqes[head & cq_mask]);
        __atomic_store_n(cq_head, head, __ATOMIC_RELEASE);
    }
}
