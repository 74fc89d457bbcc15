# shellcheck shell=dash
# What a guest does for scripts/lab/scenarios, in place of what guest-init does for scripts/million:
# each order is a number and a command for this very shell, and the host hears how it ended.
# guest-init reads this in, and has the functions that are not here.

conduct() {
    chmod 1777 "$OUT"
    echo "root:x:0:0::/:/bin/sh" >/etc/passwd
    for user in user1 user2 user3 user4; do
        echo "$user:x:100${user#user}:100::/:/bin/sh" >>/etc/passwd
    done
    while true; do
        order=''
        read -r order <&3
        if [ -z "$order" ]; then
            usleep 200000
            continue
        fi
        eval "${order#* }" >/words 2>&1
        event "done-${order%% *}" "$?" "$(tail -n 1 /words)"
    done
}

# start NAME USER COMMAND...: in the background, and in the cgroup $GROUP where one is given; what it
# prints goes to NAME.log.
start() {
    name=$1 user=$2
    shift 2
    # shellcheck disable=SC2016 # for the shell that moves
    sh -c '[ -z "$0" ] || echo $$ >"$0/cgroup.procs"; exec su "$1" -c "exec $2"' "$GROUP" "$user" "$*" \
        >"$OUT/$name.log" 2>&1 </dev/null &
    echo $! >"/pid-$name"
}

# cgroups OUTER INNER: two of version 2, one in the other, with these memory limits.
cgroups() {
    mount -t cgroup2 none /sys/fs/cgroup && cd /sys/fs/cgroup || return
    mkdir -p outer/inner &&
        echo +memory >cgroup.subtree_control && echo +memory >outer/cgroup.subtree_control &&
        echo "$1" >outer/memory.max && echo "$2" >outer/inner/memory.max
    cd /
}

# sample NAME SECONDS: every so often how many files are open here, the process's memory in kB, and
# the kernel's slabs in kB. To list 300,000 descriptors would itself take memory and time.
sample() {
    sampled=$(pid "$1")
    while kill -0 "$sampled" 2>/dev/null; do
        echo "$(cut -d ' ' -f 1 /proc/uptime) $(cut -f 1 /proc/sys/fs/file-nr)" \
            "$(awk '/^VmRSS/ { print $2 }' "/proc/$sampled/status") $(awk '/^Slab/ { print $2 }' /proc/meminfo)"
        sleep "$2"
    done >"$OUT/samples.log" 2>/dev/null &
}

# within SECONDS COMMAND...: waits until the command succeeds, and shows what the newest log says.
within() {
    deadline=$(($(uptime_seconds) + $1)) seconds=$1
    shift
    until "$@"; do
        if [ "$(uptime_seconds)" -ge "$deadline" ]; then
            echo "not within $seconds s: $*"
            return 1
        fi
        progress >/dev/console
        sleep 0.5
    done
}

progress() {
    [ $(($(uptime_seconds) - shown)) -ge "$SHOW_SECONDS" ] || return
    shown=$(uptime_seconds)
    for log in "$OUT"/*.log; do
        [ "$log" != "$OUT/server.log" ] && kill -0 "$(pid "$(basename "$log" .log)")" 2>/dev/null &&
            say "$(basename "$log" .log): $(tail -n 1 "$log")"
    done
    [ ! -f "$OUT/server.log" ] || say "server: $(tail -n 1 "$OUT/server.log")"
}

says() {
    grep -q "$2" "$OUT/$1.log"
}

ended() {
    ! kill -0 "$(pid "$1")" 2>/dev/null
}

# Its exit code; only once it has ended.
code() {
    wait "$(pid "$1")"
    echo $?
}

pid() {
    cat "/pid-$1"
}

# At most so many TCP sockets are in use.
drained() {
    [ "$(sockets_in_use)" -le "$1" ]
}

# At most so many connections are in the kernel's table.
tracked() {
    [ "$(cat /proc/sys/net/netfilter/nf_conntrack_count)" -le "$1" ]
}

# How often a process woke up from waiting, a second, and its processor time in per cent.
wakes() {
    before=$(spent "$1")
    sleep "$2"
    after=$(spent "$1")
    echo $(((${after% *} - ${before% *}) / $2)) $(((${after#* } - ${before#* }) / $2))
}

# Its voluntary switches so far, and its clock ticks (a hundredth of a second each).
spent() {
    switches=$(awk '/^voluntary/ { print $2 }' "/proc/$(pid "$1")/status")
    ticks=$(awk '{ print $14 + $15 }' "/proc/$(pid "$1")/stat")
    echo "$switches $ticks"
}

uptime_seconds() {
    cut -d. -f1 /proc/uptime
}

conduct
