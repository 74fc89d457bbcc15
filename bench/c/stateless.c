// Clients without sockets: a minimal implementation of --stateless, for comparison with the client.
//
//   stateless CONNECTIONS FIRST_PORT PORTS
//
// Opens a tun device for 198.18.0.0/15 in its network namespace, and acts as all addresses of that block except the
// first. The server is a process in the same namespace. Each connection sends one message and waits for the echo; then
// all are reset. One read and one write per packet; there are no retransmissions, so no packet may be lost.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { IN_FLIGHT = 1024, FIRST_SOURCE_PORT = 1024, SOURCE_PORTS = 64512, QUEUE = 10000, WAIT_MS = 10000, HEADERS = 40 };

static const uint32_t NETWORK = 198u << 24 | 18u << 16, SERVER = NETWORK + 1, MASK = 0xfffe0000;
static int tun, first_port, ports, connections, established;
static uint32_t *received; // by connection: the next sequence number of the server

static void die(const char *what) { perror(what); exit(1); }

static void fail(const char *what) { fprintf(stderr, "stateless: %s after %d connections\n", what, established); exit(1); }

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static void open_device(void) {
    struct ifreq request = { .ifr_flags = IFF_TUN | IFF_NO_PI };
    if ((tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC)) < 0) die("/dev/net/tun");
    if (ioctl(tun, TUNSETIFF, &request)) die("TUNSETIFF");
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
    address->sin_family = AF_INET;
    address->sin_addr.s_addr = htonl(SERVER);
    if (ioctl(control, SIOCSIFADDR, &request)) die("SIOCSIFADDR");
    address->sin_addr.s_addr = htonl(MASK);
    if (ioctl(control, SIOCSIFNETMASK, &request)) die("SIOCSIFNETMASK");
    request.ifr_qlen = QUEUE;
    if (ioctl(control, SIOCSIFTXQLEN, &request)) die("SIOCSIFTXQLEN");
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(control, SIOCSIFFLAGS, &request)) die("SIOCSIFFLAGS");
    close(control);
}

static uint32_t initial(uint32_t number) { return number * 2654435761u; }

static uint32_t sum(const void *bytes, int length, uint32_t total) {
    const uint8_t *at = bytes;
    for (; length > 1; at += 2, length -= 2) total += at[0] << 8 | at[1];
    return length ? total + (at[0] << 8) : total;
}

static uint16_t folded(uint32_t total) {
    while (total >> 16) total = (total & 0xffff) + (total >> 16);
    return htons(~total);
}

static int message(uint32_t number, char *text) { return sprintf(text, "Hello Server, connections num:%u", number + 1); }

static void send_segment(uint32_t number, uint32_t sequence, uint8_t flags, int length, const char *payload) {
    uint8_t packet[HEADERS + 64] = { 0 };
    struct iphdr *ip = (void *)packet;
    struct tcphdr *tcp = (void *)(packet + 20);
    uint32_t client = number / ports;
    *ip = (struct iphdr){ .version = 4, .ihl = 5, .tot_len = htons(HEADERS + length), .frag_off = htons(0x4000), .ttl = 64,
        .protocol = IPPROTO_TCP, .saddr = htonl(SERVER + 1 + client / SOURCE_PORTS), .daddr = htonl(SERVER) };
    ip->check = folded(sum(ip, 20, 0));
    *tcp = (struct tcphdr){ .source = htons(FIRST_SOURCE_PORT + client % SOURCE_PORTS),
        .dest = htons(first_port + number % ports), .seq = htonl(sequence), .doff = 5, .window = htons(65535) };
    if (!(flags & TH_SYN)) tcp->ack_seq = htonl(received[number]);
    ((uint8_t *)tcp)[13] = flags;
    memcpy(packet + HEADERS, payload, length);
    tcp->check = folded(sum(tcp, 20 + length, sum(&ip->saddr, 8, IPPROTO_TCP + 20 + length)));
    if (write(tun, packet, HEADERS + length) < 0) die("write");
}

static void receive(const uint8_t *packet, int length) {
    const struct iphdr *ip = (const void *)packet;
    const struct tcphdr *tcp = (const void *)(packet + ip->ihl * 4);
    if (length < HEADERS || ip->version != 4 || ip->protocol != IPPROTO_TCP) return;
    uint32_t client = (ntohl(ip->daddr) - SERVER - 1) * SOURCE_PORTS + ntohs(tcp->dest) - FIRST_SOURCE_PORT;
    uint32_t number = client * ports + ntohs(tcp->source) - first_port;
    if (number >= (uint32_t)connections) fail("a stray segment");
    if (tcp->rst || tcp->fin) fail("a reset or an end");
    char text[64];
    int size = message(number, text);
    const char *payload = (const char *)tcp + tcp->doff * 4;
    int rest = packet + ntohs(ip->tot_len) - (const uint8_t *)payload;
    if (tcp->syn) {
        received[number] = ntohl(tcp->seq) + 1;
        send_segment(number, initial(number) + 1, TH_ACK | TH_PUSH, size, text);
    } else if (rest) {
        if (rest != size || memcmp(payload, text, size)) fail("another answer");
        received[number] = ntohl(tcp->seq) + size;
        send_segment(number, initial(number) + 1 + size, TH_ACK, 0, "");
        established++;
    }
}

int main(int argc, char **argv) {
    if (argc != 4) fail("usage: stateless CONNECTIONS FIRST_PORT PORTS");
    connections = atoi(argv[1]), first_port = atoi(argv[2]), ports = atoi(argv[3]);
    if (!(received = calloc(connections, sizeof *received))) die("calloc");
    open_device();
    double began = now();
    int sent = 0;
    uint8_t packet[2048];
    while (established < connections) {
        while (sent < connections && sent - established < IN_FLIGHT) {
            send_segment(sent, initial(sent), TH_SYN, 0, "");
            sent++;
        }
        int length = read(tun, packet, sizeof packet);
        if (length > 0) {
            receive(packet, length);
        } else if (errno != EAGAIN) {
            die("read");
        } else {
            struct pollfd waiting = { .fd = tun, .events = POLLIN };
            if (poll(&waiting, 1, WAIT_MS) == 0) fail("silence for 10 s");
        }
    }
    double seconds = now() - began;
    printf("{\"connections\": %d, \"seconds\": %.3f, \"connects_per_second\": %.0f}\n", connections, seconds, connections / seconds);
    fflush(stdout);
    for (int number = 0; number < connections; number++) {
        char text[64];
        send_segment(number, initial(number) + 1 + message(number, text), TH_RST | TH_ACK, 0, "");
    }
    return 0;
}
