# shellcheck shell=bash
# What this machine allows: descriptors, memory, epoll watches, ports.
# Uses say.sh.

readonly FIRST_PORT=9900
readonly PORTS=100
# shellcheck disable=SC2034 # for scripts/million
readonly CONNECTIONS_MAX=5000000 # 100 server ports x 50,000 client ports

# A process holds N connections and a few descriptors of its own (listeners, epoll, logs).
readonly DESCRIPTORS_RESERVED=256

# Kernel and processes, both ends of a connection: 7.7 KB of slab measured, and a tenth on top.
readonly BYTES_PER_CONNECTION=8500
readonly MEMORY_BASE_MB=256

memory_available_mb() {
    local available limit
    available=$(awk '/^MemAvailable:/ { print int($2 / 1024) }' /proc/meminfo)
    limit=$(cgroup_room_mb)
    echo $((limit < available ? limit : available))
}

# What the memory cgroup around us still allows, v2 or v1; a huge number where there is none.
cgroup_room_mb() {
    local limit used
    if [[ -r /sys/fs/cgroup/memory.max ]]; then
        limit=$(</sys/fs/cgroup/memory.max)
        used=$(</sys/fs/cgroup/memory.current)
    elif [[ -r /sys/fs/cgroup/memory/memory.limit_in_bytes ]]; then
        limit=$(</sys/fs/cgroup/memory/memory.limit_in_bytes)
        used=$(</sys/fs/cgroup/memory/memory.usage_in_bytes)
    fi
    [[ ${limit:-max} =~ ^[0-9]{1,15}$ ]] || limit=$((1 << 50))
    echo $(((limit - ${used:-0}) / 1048576))
}

memory_needed_mb() {
    echo $(($1 * BYTES_PER_CONNECTION / 1000000 + MEMORY_BASE_MB))
}

# This shell and its children get the descriptors that $1 connections need, or all there are.
raise_descriptors() {
    local needed=$(($1 + DESCRIPTORS_RESERVED))
    ulimit -n "$needed" 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
}

descriptors_cap() {
    local needed=$(($1 + DESCRIPTORS_RESERVED)) allowed
    allowed=$(ulimit -n)
    [[ $allowed == unlimited ]] && return
    ((allowed >= needed)) && return
    echo "RLIMIT_NOFILE is $(grouped "$allowed") here and $(grouped "$1") connections need $(grouped "$needed") descriptors in each process; to raise it: as root, sysctl -w fs.nr_open=$((needed > 1048576 ? needed : 1048576)) && ulimit -Hn $needed, in the shell that starts this"
}

watches_cap() {
    local needed=$((2 * $1 + PORTS)) allowed
    allowed=$(</proc/sys/fs/epoll/max_user_watches)
    ((allowed >= needed)) && return
    echo "fs.epoll.max_user_watches is $(grouped "$allowed") here and both ends of $(grouped "$1") connections need $(grouped "$needed"); to raise it: as root, sysctl -w fs.epoll.max_user_watches=$needed"
}

source_ports_cap() {
    local first last room
    read -r first last </proc/sys/net/ipv4/ip_local_port_range
    room=$(((last - first + 1) * PORTS))
    ((room >= $1)) && return
    echo "net.ipv4.ip_local_port_range gives room for $(grouped "$room") connections to $PORTS ports; to raise it: as root, sysctl -w net.ipv4.ip_local_port_range='10000 65535'"
}

memory_cap() {
    local needed available
    needed=$(memory_needed_mb "$1")
    available=$(memory_available_mb)
    ((available >= needed)) && return
    echo "$(grouped "$available") MB of memory are available here and both ends of $(grouped "$1") connections need $(grouped "$needed") MB; to raise it: more memory, or a lower N"
}

# The listening ports that others hold, as a sentence.
taken_ports_cap() {
    local taken
    taken=$(listening_ports | awk -v first=$FIRST_PORT -v last=$((FIRST_PORT + PORTS - 1)) \
        '$1 >= first && $1 <= last' | sort -un | head -n 1)
    [[ -z $taken ]] && return
    echo "port $taken is in use, and the server listens on $FIRST_PORT to $((FIRST_PORT + PORTS - 1)); end the process that holds it"
}

# Local ports in state LISTEN, from /proc, so that no tool need be there.
listening_ports() {
    local address
    cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | awk '$4 == "0A" { print $2 }' |
        while IFS= read -r address; do
            echo $((16#${address##*:}))
        done
}

# What keeps $1 connections from being held natively; nothing where they fit.
native_caps() {
    raise_descriptors "$1"
    descriptors_cap "$1"
    watches_cap "$1"
    source_ports_cap "$1"
    memory_cap "$1"
    taken_ports_cap
}
