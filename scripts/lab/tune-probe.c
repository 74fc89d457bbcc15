/*
 * What the settings that belong to the whole kernel change: for a guest that is thrown away, as
 * root. scripts/lab/tune-guest boots one and runs this in it. Its settings stay changed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CONNECTIONS = 2000, FILL_BYTES = 65536 };

static int near_end[CONNECTIONS], far_end[CONNECTIONS];

static void die(const char *what)
{
    printf("tune-probe: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void setting(const char *name, const char *format, ...)
{
    char path[128];
    snprintf(path, sizeof path, "/proc/sys/%s", name);
    FILE *file = fopen(path, "w");
    va_list values;
    va_start(values, format);
    if (!file || vfprintf(file, format, values) < 0 || fclose(file))
        die(name);
    va_end(values);
}

/* The number after `word` in the line of `path` that starts with `line`. */
static long figure(const char *path, const char *line, const char *word)
{
    char text[256];
    long value = -1;
    FILE *file = fopen(path, "r");
    while (file && fgets(text, sizeof text, file)) {
        char *found = strncmp(text, line, strlen(line)) ? NULL : strstr(text, word);
        if (found)
            value = atol(found + strlen(word));
    }
    if (file)
        fclose(file);
    return value;
}

/* /proc/net/netstat has a line of names and a line of values. */
static long counter(const char *name)
{
    static char names[16384], values[16384];
    FILE *file = fopen("/proc/net/netstat", "r");
    long value = -1;
    if (file && fgets(names, sizeof names, file) && fgets(values, sizeof values, file)) {
        char *next_name, *next_value;
        char *key = strtok_r(names, " \n", &next_name);
        char *number = strtok_r(values, " \n", &next_value);
        for (; key && number; key = strtok_r(NULL, " \n", &next_name),
                              number = strtok_r(NULL, " \n", &next_value))
            if (!strcmp(key, name))
                value = atol(number);
    }
    if (file)
        fclose(file);
    return value;
}

static int open_pairs(int wanted)
{
    int listener = socket(AF_INET, SOCK_STREAM, 0), count = 0;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    if (bind(listener, (void *)&address, length) || listen(listener, 4096) ||
        getsockname(listener, (void *)&address, &length))
        die("listen");
    struct timeval patience = {.tv_sec = 5};
    for (; count < wanted; count++) {
        int end = socket(AF_INET, SOCK_STREAM, 0);
        setsockopt(end, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
        setsockopt(listener, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        if (end < 0 || connect(end, (void *)&address, length) ||
            (far_end[count] = accept(listener, NULL, NULL)) < 0) {
            printf("    connection %d: %s\n", count + 1, strerror(errno));
            close(end);
            break;
        }
        near_end[count] = end;
    }
    close(listener);
    return count;
}

static void close_pairs(int count)
{
    struct linger reset = {.l_onoff = 1};
    for (int i = 0; i < count; i++) {
        setsockopt(near_end[i], SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
        close(near_end[i]);
        close(far_end[i]);
    }
    sleep(1);
}

static int echo_all(int count)
{
    char message[64] = "echo";
    int whole = 0;
    struct timeval patience = {.tv_sec = 1};
    for (int i = 0; i < count; i++) {
        setsockopt(far_end[i], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        setsockopt(near_end[i], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        if (send(near_end[i], message, 64, 0) == 64 && recv(far_end[i], message, 64, 0) == 64 &&
            send(far_end[i], message, 64, 0) == 64 && recv(near_end[i], message, 64, 0) == 64)
            whole++;
    }
    return whole;
}

/* Sends to peers that do not read, what the kernel takes without waiting. */
static long fill_all(int count)
{
    static char block[FILL_BYTES];
    long taken = 0;
    for (int i = 0; i < count; i++) {
        ssize_t sent = send(near_end[i], block, sizeof block, MSG_DONTWAIT);
        taken += sent > 0 ? sent : 0;
    }
    return taken;
}

static void probe_tcp_mem(const char *pages)
{
    long aborted = counter("TCPAbortOnMemory"), pressed = counter("TCPMemoryPressures");
    long pruned = counter("TCPRcvQDrop");
    if (pages)
        setting("net/ipv4/tcp_mem", "%s", pages);
    printf("  tcp_mem %s:\n", pages ? pages : "as it was");
    int count = open_pairs(CONNECTIONS);
    printf("    %d of %d opened, %d echoed, %ld pages used\n", count, CONNECTIONS, echo_all(count),
           figure("/proc/net/sockstat", "TCP:", "mem "));
    long taken = fill_all(count);
    printf("    64 KiB to each that reads nothing: %ld bytes taken of each, %ld pages used\n",
           taken / (count ? count : 1), figure("/proc/net/sockstat", "TCP:", "mem "));
    printf("    TCPMemoryPressures %ld, TCPAbortOnMemory %ld, TCPRcvQDrop %ld\n",
           counter("TCPMemoryPressures") - pressed, counter("TCPAbortOnMemory") - aborted,
           counter("TCPRcvQDrop") - pruned);
    close_pairs(count);
}

/* The descriptor limit can't be raised above fs.nr_open, not even by root. */
static void probe_nr_open(int nr_open)
{
    struct rlimit kept, wanted = {2000000, 2000000};
    getrlimit(RLIMIT_NOFILE, &kept);
    setting("fs/nr_open", "%d", nr_open);
    printf("  fs.nr_open %d, root asks for 2,000,000 descriptors: %s\n", nr_open,
           setrlimit(RLIMIT_NOFILE, &wanted) ? strerror(errno) : "granted");
    setrlimit(RLIMIT_NOFILE, &kept);
}

/* tcp_rmem below 4096 is refused by some kernels, taken by others. */
static void probe_tiny_buffers(const char *name)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/sys/net/ipv4/%s", name);
    char usual[64];
    int file = open(path, O_RDWR);
    ssize_t length = read(file, usual, sizeof usual);
    printf("  %s = 512 512 1024: %s\n", name,
           pwrite(file, "512 512 1024", 12, 0) < 0 ? strerror(errno) : "taken");
    if (length < 0 || pwrite(file, usual, length, 0) < 0)
        die(name);
    close(file);
}

static void probe_watches(void)
{
    setting("fs/epoll/max_user_watches", "1000");
    int count = open_pairs(CONNECTIONS), epoll = epoll_create1(0), watched = 0;
    struct epoll_event event = {.events = EPOLLIN};
    while (watched < count && !epoll_ctl(epoll, EPOLL_CTL_ADD, near_end[watched], &event))
        watched++;
    printf("  max_user_watches 1000: epoll_ctl number %d says: %s\n", watched + 1,
           watched < count ? strerror(errno) : "nothing");
    close(epoll);
    setting("fs/epoll/max_user_watches", "1000000");
    close_pairs(count);
}

static void open_until_refused(const char *who)
{
    int opened = 0;
    while (opened < CONNECTIONS && socket(AF_INET, SOCK_STREAM, 0) >= 0)
        opened++;
    printf("  file-max 500, %s: %d sockets, then: %s\n", who, opened,
           opened < CONNECTIONS ? strerror(errno) : "no end");
    fflush(stdout);
}

static void probe_file_max(void)
{
    setting("fs/file-max", "500");
    for (int as_nobody = 0; as_nobody < 2; as_nobody++) {
        if (fork() == 0) {
            if (as_nobody && setresuid(65534, 65534, 65534))
                die("setresuid");
            open_until_refused(as_nobody ? "an ordinary user" : "root");
            _exit(0);
        }
        wait(NULL);
    }
    setting("fs/file-max", "1000000");
}

/* The far end closes with data that its peer has not read yet. */
static void probe_orphans(int orphans_max)
{
    setting("net/ipv4/tcp_max_orphans", "%d", orphans_max);
    static char block[FILL_BYTES * 4];
    int count = open_pairs(300), whole = 0, reset = 0;
    long queued[CONNECTIONS] = {0};
    for (int i = 0; i < count; i++) {
        ssize_t sent;
        while ((sent = send(far_end[i], block, sizeof block, MSG_DONTWAIT)) > 0)
            queued[i] += sent;
        close(far_end[i]);
    }
    long orphans = figure("/proc/net/sockstat", "TCP:", "orphan ");
    struct timeval patience = {.tv_sec = 2};
    for (int i = 0; i < count; i++) {
        ssize_t received;
        setsockopt(near_end[i], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        while ((received = recv(near_end[i], block, sizeof block, 0)) > 0)
            queued[i] -= received;
        whole += received == 0 && queued[i] == 0;
        reset += received < 0 && errno == ECONNRESET;
        far_end[i] = -1;
    }
    printf("  tcp_max_orphans %d: %ld orphans after closing %d with unread data; %d peers got all of "
           "it, %d a reset\n", orphans_max, orphans, count, whole, reset);
    close_pairs(count);
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    struct rlimit limit = {10000, 10000};
    if (setrlimit(RLIMIT_NOFILE, &limit))
        die("setrlimit");
    probe_nr_open(1048576);
    probe_nr_open(2000000);
    probe_tiny_buffers("tcp_rmem");
    probe_tiny_buffers("tcp_wmem");
    probe_tcp_mem(NULL);
    probe_tcp_mem("100 200 300");
    setting("net/ipv4/tcp_mem", "250000 300000 350000");
    probe_watches();
    probe_file_max();
    probe_orphans(100000);
    probe_orphans(100);
    puts("tune-probe: done");
    return 0;
}
