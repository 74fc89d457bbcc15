# shellcheck shell=bash
# What this machine allows: memory, files, epoll watches, ports, and descriptors where they count.
# Uses say.sh.

readonly FIRST_PORT=9900
readonly PORTS=100
# shellcheck disable=SC2034 # for scripts/million
readonly CONNECTIONS_MAX=5000000 # 100 server ports x 50,000 client ports

# Without registered files a process holds N descriptors and a few of its own (listeners, epoll, logs).
readonly DESCRIPTORS_RESERVED=256
# Both ends' other files, and those of whatever else runs here.
readonly FILES_RESERVED=4096

# Kernel and processes, both ends of a connection: 7.9 KB of slab measured with descriptors, 8.3 KB with registered
# files, and what the processes keep.
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

# Why sockets can't live in registered-file tables of io_uring here, beyond RLIMIT_NOFILE; nothing where they can.
registered_files_refused() {
    local kernel
    kernel=$(uname -r)
    if [[ $(printf '%s\n' 6.8 "$kernel" | sort -V | head -n 1) != 6.8 ]]; then
        echo "registered files want Linux 6.8, and this is $kernel"
    elif ! io_uring_allowed; then
        echo "io_uring is not allowed here (kernel.io_uring_disabled, or a container's seccomp filter)"
    fi
}

# Asks for a ring: system call 425 on all architectures, which fills in the 120 bytes of its parameters. Where there is
# no perl to ask with, what the administrator has set must do.
io_uring_allowed() {
    if command -v perl >/dev/null; then
        perl -e 'my $parameters = "\0" x 120; exit(syscall(425, 1, $parameters) < 0)' 2>/dev/null
    else
        [[ $(cat /proc/sys/kernel/io_uring_disabled 2>/dev/null || echo 0) == 0 ]]
    fi
}

# What counts per process is N descriptors, unless sockets live elsewhere.
descriptors_cap() {
    local needed=$(($1 + DESCRIPTORS_RESERVED)) allowed refused
    allowed=$(ulimit -n)
    [[ $allowed == unlimited ]] && return
    ((allowed >= needed)) && return
    refused=$(registered_files_refused)
    [[ -z $refused ]] && return
    echo "RLIMIT_NOFILE is $(grouped "$allowed") here and $(grouped "$1") connections need $(grouped "$needed") descriptors in each process, for $refused; to raise it: as root, sysctl -w fs.nr_open=$((needed > 1048576 ? needed : 1048576)) && ulimit -Hn $needed, in the shell that starts this"
}

# Both ends' sockets are files of the system, wherever they live; the kernel lets CAP_SYS_ADMIN have more.
files_cap() {
    local needed=$((2 * $1 + FILES_RESERVED)) allowed in_use
    may_exceed_file_max && return
    allowed=$(file_max)
    read -r in_use _ </proc/sys/fs/file-nr
    ((${#allowed} > 15 || allowed - in_use >= needed)) && return
    echo "fs.file-max leaves $(grouped $((allowed - in_use))) files here and both ends of $(grouped "$1") connections need $(grouped "$needed"); to raise it: as root, sysctl -w fs.file-max=$((needed + in_use))"
}

file_max() {
    cat /proc/sys/fs/file-max
}

# Capability 21, and that of the machine: one of an own user namespace does not count.
may_exceed_file_max() {
    local first outside count mask
    read -r first outside count </proc/self/uid_map
    mask=$(awk '$1 == "CapEff:" { print $2 }' /proc/self/status)
    ((first == 0 && outside == 0 && count == 4294967295 && (16#$mask >> 21 & 1) == 1))
}

watches_cap() {
    local needed=$((2 * $1 + PORTS)) allowed
    allowed=$(</proc/sys/fs/epoll/max_user_watches)
    ((allowed >= needed)) && return
    echo "fs.epoll.max_user_watches is $(grouped "$allowed") here and both ends of $(grouped "$1") connections need $(grouped "$needed"); to raise it: as root, sysctl -w fs.epoll.max_user_watches=$needed"
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

# native_caps TOPOLOGY CONNECTIONS: what keeps them from being held natively; nothing where they fit. Local ports
# do not: over loopback a client has more addresses than it needs, and three hosts' namespaces set their own range.
native_caps() {
    raise_descriptors "$2"
    descriptors_cap "$2"
    files_cap "$2"
    watches_cap "$2"
    memory_cap "$2"
    # Three hosts have the ports of their own namespaces.
    [[ $1 == three-hosts ]] || taken_ports_cap
}
