# shellcheck shell=sh
# What the kernel says of itself at one moment. POSIX sh: the guest's busybox runs it too.

# snapshot FOLDER [SERVER_PID]; what can't be read here (slabinfo wants root) is left out.
snapshot() {
    mkdir -p "$1"
    keep /proc/slabinfo "$1/slabinfo"
    keep /proc/net/sockstat "$1/sockstat"
    keep /proc/net/netstat "$1/netstat"
    keep /proc/net/snmp "$1/snmp"
    keep /proc/net/dev "$1/netdev"
    keep /proc/net/softnet_stat "$1/softnet_stat"
    keep /proc/meminfo "$1/meminfo"
    if [ -n "${2:-}" ]; then
        keep "/proc/$2/smaps_rollup" "$1/server-smaps_rollup"
        keep "/proc/$2/status" "$1/server-status"
    fi
}

keep() {
    cat "$1" 2>/dev/null >"$2" || rm -f "$2"
}

# TCP sockets in use in this network namespace.
sockets_in_use() {
    awk '$1 == "TCP:" { print $3 }' /proc/net/sockstat
}
