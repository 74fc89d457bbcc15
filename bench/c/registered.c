// Both ends of a million connections without a million descriptors: sockets in registered-file tables.
//
//   registered serve FIRST_PORT PORTS           echoes all input, until it is ended by a signal
//   registered flood IP FIRST_PORT PORTS N      opens N connections, sends 64 bytes on each and checks the echo,
//                                               holds them for 5 s, prints the time of the ramp, and resets them
//
// RLIMIT_NOFILE limits the size of one table of descriptors, and every io_uring has its own table. So a
// socket has a descriptor only during its set-up:
//
//   set-up   accept4, or socket and connect; epoll_ctl(ADD), with the number of its slot as user data
//   park     IORING_REGISTER_FILES_UPDATE puts a run of sockets into a run of slots, and close_range closes
//            their descriptors; epoll still watches the files, because the table keeps them open
//   work     RECV, SEND and CONNECT with IOSQE_FIXED_FILE and MSG_DONTWAIT complete inside io_uring_enter;
//            all receives of one epoll_wait are submitted together, and so are the sends that follow
//   close    the slot is updated to -1
//
// Slot s is entry s % table_slots of the table of ring s / table_slots. The program shows the minimum cost of
// this technique in time and kernel memory, for comparison with the reactor. It needs Linux 5.19 and no
// library.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/close_range.h>
#include <linux/io_uring.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef IP_LOCAL_PORT_RANGE
#define IP_LOCAL_PORT_RANGE 51 // since Linux 6.3
#endif

enum {
    SLOTS_MAX = 1 << 23,
    TABLE_SLOTS_MAX = 1 << 14, // if RLIMIT_NOFILE allows it
    RINGS_MAX = 1 << 12,
    // Ring memory counts against RLIMIT_MEMLOCK (8 MB by default) for unprivileged users, so rings are small.
    ENTRIES = 128,
    EVENTS = 1024,
    ACCEPTS = 64,  // from one listener, before others are served
    UPDATES = 256, // sockets that hold a descriptor at once
    BACKLOG = 4096,
    IN_FLIGHT = 1024,
    MESSAGE = 64,
    BUFFER = 1024,
    SILENCE_MS = 10000,
    HOLD_MS = 5000,
};

static void die(const char *what) { perror(what); exit(1); }

static void fail(const char *what) { fprintf(stderr, "registered: %s\n", what); exit(1); }

static uint64_t now_ms(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

// ---------------------------------------------------------------- rings, each with a table of sockets

struct ring {
    int fd;
    unsigned waiting; // entries that are not submitted yet
    int is_busy;      // it is in `busy`
    unsigned sq_mask, cq_mask;
    unsigned *sq_tail, *cq_head, *cq_tail;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
};

static struct ring rings[RINGS_MAX];
static unsigned ring_count, table_slots;
static struct ring *busy[RINGS_MAX]; // rings with entries to submit
static unsigned busy_count;

// The user data of a completion consists of step, buffer and slot, from the highest bits down.
enum step { ECHO_RECEIVED, ECHO_SENT, PROOF_SENT, PROOF_RECEIVED, RESET_DONE };

static void complete(enum step step, unsigned buffer, unsigned slot, int result);

// The soft limit limits the size of a table, so it is raised to the hard limit first.
static void raise_descriptor_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit)) die("getrlimit");
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit)) die("setrlimit");
    for (table_slots = 1; table_slots < TABLE_SLOTS_MAX && 2 * table_slots <= limit.rlim_cur;) table_slots *= 2;
}

static void map_ring(struct ring *ring, const struct io_uring_params *params) {
    // Submissions and completions share one mapping; the array of indices is its end.
    size_t size = params->sq_off.array + params->sq_entries * sizeof(unsigned);
    char *shared = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd, IORING_OFF_SQ_RING);
    ring->sqes = mmap(0, params->sq_entries * sizeof *ring->sqes, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd,
                      IORING_OFF_SQES);
    if (shared == MAP_FAILED || ring->sqes == MAP_FAILED) die("mmap");
    ring->sq_tail = (unsigned *)(shared + params->sq_off.tail);
    ring->sq_mask = *(unsigned *)(shared + params->sq_off.ring_mask);
    ring->cq_head = (unsigned *)(shared + params->cq_off.head);
    ring->cq_tail = (unsigned *)(shared + params->cq_off.tail);
    ring->cq_mask = *(unsigned *)(shared + params->cq_off.ring_mask);
    ring->cqes = (struct io_uring_cqe *)(shared + params->cq_off.cqes);
    for (unsigned i = 0; i <= ring->sq_mask; i++) ((unsigned *)(shared + params->sq_off.array))[i] = i;
}

static void add_ring(void) {
    if (ring_count == RINGS_MAX) fail("too many rings");
    struct ring *ring = &rings[ring_count++];
    struct io_uring_params params = { .flags = IORING_SETUP_SUBMIT_ALL };
    ring->fd = syscall(SYS_io_uring_setup, ENTRIES, &params);
    if (ring->fd < 0) die("io_uring_setup");
    map_ring(ring, &params);
    struct io_uring_rsrc_register table = { .nr = table_slots, .flags = IORING_RSRC_REGISTER_SPARSE };
    if (syscall(SYS_io_uring_register, ring->fd, IORING_REGISTER_FILES2, &table, sizeof table))
        die("IORING_REGISTER_FILES2");
}

static struct ring *ring_of(unsigned slot) {
    while (slot / table_slots >= ring_count) add_ring();
    return &rings[slot / table_slots];
}

// Submits the entries and takes the completions. Everything completes at once, so there are never more
// completions than entries: the completion queue holds twice that number and can't overflow.
static void run(struct ring *ring) {
    while (ring->waiting) {
        int taken = syscall(SYS_io_uring_enter, ring->fd, ring->waiting, 0, 0, 0, 0);
        if (taken < 0 && errno != EINTR) die("io_uring_enter");
        if (taken > 0) ring->waiting -= taken;
    }
    unsigned head = *ring->cq_head, tail = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE);
    for (; head != tail; head++) {
        const struct io_uring_cqe *cqe = &ring->cqes[head & ring->cq_mask];
        complete(cqe->user_data >> 48, cqe->user_data >> 32 & 0xffff, cqe->user_data & 0xffffffff, cqe->res);
    }
    __atomic_store_n(ring->cq_head, head, __ATOMIC_RELEASE);
}

// A completion may lead to another operation: an echo's receive is followed by its send.
static void run_all(void) {
    while (busy_count) {
        struct ring *ring = busy[--busy_count];
        ring->is_busy = 0;
        run(ring);
    }
}

static struct io_uring_sqe *ask(int opcode, enum step step, unsigned buffer, unsigned slot) {
    struct ring *ring = ring_of(slot);
    while (ring->waiting == ENTRIES) run(ring); // twice, if all completions lead to another operation
    if (!ring->is_busy) busy[busy_count++] = ring;
    ring->is_busy = 1;
    ring->waiting++;
    unsigned tail = *ring->sq_tail;
    struct io_uring_sqe *sqe = &ring->sqes[tail & ring->sq_mask];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = opcode;
    sqe->flags = IOSQE_FIXED_FILE;
    sqe->fd = slot % table_slots;
    sqe->user_data = (uint64_t)step << 48 | (uint64_t)buffer << 32 | slot;
    __atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
    return sqe;
}

static char buffers[EVENTS][BUFFER]; // indexed by the event

static void ask_receive(enum step step, unsigned buffer, unsigned slot) {
    struct io_uring_sqe *sqe = ask(IORING_OP_RECV, step, buffer, slot);
    sqe->addr = (uintptr_t)buffers[buffer];
    sqe->len = BUFFER;
    sqe->msg_flags = MSG_DONTWAIT;
}

static void ask_send(enum step step, unsigned buffer, unsigned slot, unsigned size) {
    struct io_uring_sqe *sqe = ask(IORING_OP_SEND, step, buffer, slot);
    sqe->addr = (uintptr_t)buffers[buffer];
    sqe->len = size;
    sqe->msg_flags = MSG_DONTWAIT | MSG_NOSIGNAL;
}

// Connecting a socket to AF_UNSPEC resets its connection.
static void ask_reset(unsigned slot) {
    static const struct sockaddr none = { .sa_family = AF_UNSPEC };
    struct io_uring_sqe *sqe = ask(IORING_OP_CONNECT, RESET_DONE, 0, slot);
    sqe->addr = (uintptr_t)&none;
    sqe->off = sizeof none;
}

// ---------------------------------------------------------------- sockets into slots, and out of them

static unsigned update_slots[UPDATES];
static int update_fds[UPDATES]; // -1 empties the slot
static unsigned updates;

// The number of updates from `first` on that fill consecutive slots of one table, and need only one call.
static unsigned slots_in_a_row(unsigned first) {
    unsigned end = first + 1;
    while (end < updates && update_slots[end] == update_slots[end - 1] + 1 && update_slots[end] % table_slots) end++;
    return end - first;
}

static unsigned descriptors_in_a_row(unsigned first) {
    unsigned end = first + 1;
    while (end < updates && update_fds[first] >= 0 && update_fds[end] == update_fds[end - 1] + 1) end++;
    return end - first;
}

static void apply_updates(void) {
    for (unsigned i = 0, n; i < updates; i += n) {
        n = slots_in_a_row(i);
        struct io_uring_rsrc_update update = {
            .offset = update_slots[i] % table_slots, .data = (uintptr_t)&update_fds[i] };
        int ring = ring_of(update_slots[i])->fd;
        if (syscall(SYS_io_uring_register, ring, IORING_REGISTER_FILES_UPDATE, &update, n) != (long)n)
            die("IORING_REGISTER_FILES_UPDATE");
    }
    for (unsigned i = 0, n; i < updates; i += n) {
        n = descriptors_in_a_row(i);
        if (update_fds[i] >= 0) syscall(SYS_close_range, update_fds[i], update_fds[i] + n - 1, 0);
    }
    updates = 0;
}

static void queue_update(unsigned slot, int fd) {
    if (updates == UPDATES) apply_updates();
    update_slots[updates] = slot;
    update_fds[updates++] = fd;
}

static int epoll;
static struct epoll_event events[EVENTS];

static int watch(int fd, unsigned interest, uint64_t data) {
    struct epoll_event event = { .events = interest, .data.u64 = data };
    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

// ---------------------------------------------------------------- serve

static const uint64_t LISTENER = 1ull << 32; // plus its descriptor; lower values are slots

static unsigned next_slot;          // all below it have been in use
static unsigned freed[SLOTS_MAX];   // a queue, so that slots freed in a row are used again in a row
static unsigned freed_head, freed_tail;

static void listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, BACKLOG)) die("listen");
    if (watch(fd, EPOLLIN, LISTENER | fd)) die("epoll_ctl");
}

static unsigned take_slot(void) {
    if (freed_head != freed_tail) return freed[freed_head++ % SLOTS_MAX];
    if (next_slot == SLOTS_MAX) fail("too many connections");
    return next_slot++;
}

static void give_slot(unsigned slot) {
    freed[freed_tail++ % SLOTS_MAX] = slot;
    queue_update(slot, -1);
}

static void accept_some(int listener) {
    for (int n = 0; n < ACCEPTS; n++) {
        int fd = accept4(listener, 0, 0, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return;
        unsigned slot = take_slot();
        // Level-triggered and never changed: the rest after one receive is reported by the next wait.
        if (watch(fd, EPOLLIN, slot)) die("epoll_ctl");
        queue_update(slot, fd);
    }
}

static void serve(int first_port, int ports) {
    for (int i = 0; i < ports; i++) listen_on(first_port + i);
    puts("ready");
    fflush(stdout);
    for (;;) {
        int count = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            uint64_t data = events[i].data.u64;
            if (data < LISTENER) ask_receive(ECHO_RECEIVED, i, data);
            else accept_some(data & 0xffffffff);
        }
        run_all();
        apply_updates();
    }
}

static unsigned echo_size[EVENTS];

static void echo_received(unsigned buffer, unsigned slot, int result) {
    if (result > 0) ask_send(ECHO_SENT, buffer, slot, echo_size[buffer] = result);
    else if (result != -EAGAIN) give_slot(slot);
}

// ---------------------------------------------------------------- flood

enum state { CONNECTING, AWAITING, PROVEN, GONE };

static unsigned char states[SLOTS_MAX];
static unsigned proven, failed, lost;
static unsigned first_local_port, local_ports;
static struct sockaddr_in target;

static void read_local_ports(void) {
    unsigned last = 0;
    FILE *file = fopen("/proc/sys/net/ipv4/ip_local_port_range", "r");
    if (!file || fscanf(file, "%u %u", &first_local_port, &last) != 2) die("net.ipv4.ip_local_port_range");
    fclose(file);
    local_ports = last + 1 - first_local_port;
}

// A range of one port saves the kernel the search. Without the option, or if that port is in use, it searches.
static int connect_from(int fd, unsigned local_port) {
    unsigned range = local_port << 16 | local_port, any = 0;
    setsockopt(fd, IPPROTO_IP, IP_LOCAL_PORT_RANGE, &range, sizeof range);
    if (!connect(fd, (struct sockaddr *)&target, sizeof target) || errno == EINPROGRESS) return 0;
    if (errno != EADDRNOTAVAIL || setsockopt(fd, IPPROTO_IP, IP_LOCAL_PORT_RANGE, &any, sizeof any)) return -1;
    return connect(fd, (struct sockaddr *)&target, sizeof target) && errno != EINPROGRESS ? -1 : 0;
}

static void give_up(unsigned slot) {
    if (states[slot] == PROVEN) lost++;
    else failed++;
    states[slot] = GONE;
}

static void open_one(unsigned slot, unsigned first_port, unsigned ports) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) die("socket");
    target.sin_port = htons(first_port + slot % ports);
    if (connect_from(fd, first_local_port + slot / ports % local_ports)) {
        close(fd);
        give_up(slot);
        return;
    }
    if (watch(fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, slot)) die("epoll_ctl");
    queue_update(slot, fd);
}

// The message that proves a connection: its number, eight times.
static void write_message(char *bytes, uint64_t slot) {
    for (unsigned i = 0; i < MESSAGE / sizeof slot; i++) memcpy(bytes + i * sizeof slot, &slot, sizeof slot);
}

static void on_ready(unsigned buffer, unsigned slot, unsigned ready) {
    if (states[slot] == GONE) return;
    if (ready & (EPOLLERR | EPOLLHUP | EPOLLRDHUP)) {
        give_up(slot);
        queue_update(slot, -1);
    } else if (states[slot] == CONNECTING) {
        write_message(buffers[buffer], slot);
        states[slot] = AWAITING;
        ask_send(PROOF_SENT, buffer, slot, MESSAGE);
    } else if (states[slot] == AWAITING && ready & EPOLLIN) {
        ask_receive(PROOF_RECEIVED, buffer, slot);
    }
}

static void proof_received(unsigned buffer, unsigned slot, int result) {
    char wanted[MESSAGE];
    write_message(wanted, slot);
    if (result == -EAGAIN) return;
    if (result == MESSAGE && !memcmp(buffers[buffer], wanted, MESSAGE)) {
        states[slot] = PROVEN;
        proven++;
    } else {
        give_up(slot);
        queue_update(slot, -1);
    }
}

// One wait and the handling of its events; false if there was no event in time.
static int turn(int wait_ms) {
    int count = epoll_wait(epoll, events, EVENTS, wait_ms);
    for (int i = 0; i < count; i++) on_ready(i, events[i].data.u64, events[i].events);
    run_all();
    apply_updates();
    return count != 0;
}

static void ramp(unsigned first_port, unsigned ports, unsigned n) {
    for (unsigned opened = 0; proven + failed + lost < n;) {
        while (opened < n && opened - proven - failed - lost < IN_FLIGHT) open_one(opened++, first_port, ports);
        apply_updates();
        if (!turn(SILENCE_MS)) {
            fprintf(stderr, "registered: the server has been silent for %d s\n", SILENCE_MS / 1000);
            failed = n - proven - lost;
        }
    }
}

static void hold(void) {
    uint64_t end = now_ms() + HOLD_MS;
    for (uint64_t now = now_ms(); now < end; now = now_ms()) turn(end - now);
}

static int flood(unsigned first_port, unsigned ports, unsigned n) {
    if (n > SLOTS_MAX) fail("too many connections");
    read_local_ports();
    uint64_t begin = now_ms();
    ramp(first_port, ports, n);
    double seconds = (now_ms() - begin) / 1e3;
    printf("holding %u connections after %.2f s, %.0f a second\n", proven, seconds, proven / seconds);
    fflush(stdout);
    hold();
    for (unsigned slot = 0; slot < n; slot++)
        if (states[slot] == PROVEN) ask_reset(slot);
    run_all();
    printf("ramp_seconds %.2f proven %u failed %u lost %u\n", seconds, proven, failed, lost);
    return failed || lost;
}

// ---------------------------------------------------------------- both

static void complete(enum step step, unsigned buffer, unsigned slot, int result) {
    switch (step) {
    case ECHO_RECEIVED: echo_received(buffer, slot, result); return;
    case ECHO_SENT: if (result != (int)echo_size[buffer]) give_slot(slot); return;
    case PROOF_RECEIVED: proof_received(buffer, slot, result); return;
    case PROOF_SENT: if (result != MESSAGE) give_up(slot); return;
    case RESET_DONE: return;
    }
}

int main(int argc, char **argv) {
    int serves = argc == 4 && !strcmp(argv[1], "serve"), floods = argc == 6 && !strcmp(argv[1], "flood");
    if (!serves && !floods)
        return fputs("registered serve FIRST_PORT PORTS | flood IP FIRST_PORT PORTS N\n", stderr), 2;
    raise_descriptor_limit();
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0) die("epoll_create1");
    if (serves) serve(atoi(argv[2]), atoi(argv[3]));
    target.sin_family = AF_INET;
    if (inet_pton(AF_INET, argv[2], &target.sin_addr) != 1) return fputs("registered: no such IP\n", stderr), 2;
    return flood(atoi(argv[3]), atoi(argv[4]), atoi(argv[5]));
}
