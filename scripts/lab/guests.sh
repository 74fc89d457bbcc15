# shellcheck shell=bash
# The run in virtual machines: one guest with both ends, or a server and two clients.
# The host conducts: it waits for events on each guest's console and answers with orders.
# Uses all the others; sets EXIT_CODE.

readonly GUEST_HOLD_SECONDS=10
readonly GUEST_CPUS=2       # one for the server, one for the client
readonly HOST_RESERVE_MB=768 # what stays with the host: qemu itself, caches, the rest

declare -A event=() # "guest event" -> the event's arguments
guests=()           # all of them
client_guests=()    # those that run a client
MACHINE=''

# guests_run TOPOLOGY CONNECTIONS
guests_run() {
    trap guests_interrupt INT TERM
    guests_plan "$1" "$2"
    guests_boot
    guests_conduct "$2"
    guests_collect
    trap - INT TERM
}

# guests_prepare TOPOLOGY CONNECTIONS, before anything is built: memory, and what guests are made of.
guests_prepare() {
    guests_size "$1" "$2"
    packages_fetch
}

# MEMORY_MB: as asked for, or a fifth more than is needed, where the host has it.
guests_size() {
    local needed available kernels=1
    [[ $1 == three-hosts ]] && kernels=3
    needed=$(($(memory_needed_mb "$2") + (kernels - 1) * MEMORY_BASE_MB))
    available=$(($(memory_available_mb) - HOST_RESERVE_MB))
    if [[ -n $MEMORY_MB ]]; then
        ((MEMORY_MB <= available)) || fail "--memory asks for $(grouped "$MEMORY_MB") MB, and this machine can give $(grouped "$available") MB"
        ((MEMORY_MB >= needed)) || say "capped: $(grouped "$2") connections need some $(grouped "$needed") MB, and --memory gives $(grouped "$MEMORY_MB") MB: trying as far as it goes"
        return
    fi
    ((available >= needed)) || fail "$(grouped "$2") connections in a virtual machine need $(grouped "$needed") MB, and this machine can give $(grouped "$available") MB: free some, or ask for fewer"
    MEMORY_MB=$((needed * 6 / 5 < available ? needed * 6 / 5 : available))
}

guests_plan() {
    MACHINE=$OUT/machine
    mkdir "$MACHINE"
    initramfs_build "$MACHINE/initramfs"
    if [[ $1 == three-hosts ]]; then
        guests=(server client-1 client-2) client_guests=(client-1 client-2)
    else
        guests=(one) client_guests=(one)
    fi
    qemu_choose_accel
    echo "accel: $ACCEL" >>"$OUT/machine.txt"
}

guests_boot() {
    local guest half=$((CONNECTIONS / 2))
    local server_mb=${SERVER_MEMORY_MB:-$((MEMORY_MB / 2))}
    local client_mb=$(((MEMORY_MB - server_mb) / 2))
    say "booting ${guests[*]} with $(grouped "$MEMORY_MB") MB in all ($ACCEL)"
    if [[ ${guests[0]} == one ]]; then
        guest_boot one "$MEMORY_MB" "$CONNECTIONS" "lab_client=client lab_server=127.0.0.1"
    else
        guest_boot server "$server_mb" "$CONNECTIONS" "" 1 2
        guest_boot client-1 "$client_mb" $((CONNECTIONS - half)) \
            "lab_client=client-1 lab_server=$SERVER_ADDRESS_1" 1
        guest_boot client-2 "$client_mb" "$half" \
            "lab_client=client-2 lab_server=$SERVER_ADDRESS_2" 2
    fi
    for guest in "${guests[@]}"; do
        follow "$guest" "$(guest_console "$guest")"
    done
}

# guest_boot NAME MEMORY_MB CONNECTIONS PARAMETERS [CABLE...]
# A cable carries frames as datagrams over a pair of unix sockets; docs/lab.md tells why not a stream.
guest_boot() {
    local name=$1 memory=$2 cable options=() here=server there=client end=1
    local parameters="lab_role=$name lab_connections=$3 lab_hold=$GUEST_HOLD_SECONDS $4"
    if [[ $name != server ]]; then
        here=client there=server end=2
    fi
    shift 4
    for cable in "$@"; do
        options+=(-netdev "dgram,id=cable$cable,local.type=unix,local.path=cable$cable-$here,remote.type=unix,remote.path=cable$cable-$there")
        options+=(-device "virtio-net-pci,netdev=cable$cable,mac=52:54:00:c1:0$cable:0$end")
    done
    qemu_boot "$name" "$memory" "$GUEST_CPUS" "$(guest_console "$name")" "$parameters" "${options[@]}"
}

guest_console() {
    if [[ $1 == one ]]; then echo "$OUT/console.log"; else echo "$OUT/console-$1.log"; fi
}

guests_conduct() {
    local began=$SECONDS
    await booted 180 "${guests[@]}"
    await ready 120 "${guests[@]}"
    say "ready after $((SECONDS - began)) s; opening connections"
    order start "${client_guests[@]}"
    await holding $((300 + $1 / 250)) "${client_guests[@]}"
    if guests_hold; then
        order peak "${guests[@]}"
        await snapped 180 "${guests[@]}"
        order release "${client_guests[@]}"
    fi
    await finished $((300 + $1 / 250)) "${client_guests[@]}"
    guests_tear_down "$1"
    guests_exit_code
}

# The server's guest first, which waits until all its sockets are gone: a client's guest may still
# have its last RSTs in the queue before the cable, and must not be switched off with them.
guests_tear_down() {
    local guest
    for guest in "${guests[@]}"; do
        order teardown "$guest"
        await shipped $((300 + $1 / 250)) "$guest"
    done
}

guests_hold() {
    local guest
    for guest in "${client_guests[@]}"; do
        [[ -n ${event[$guest holding]+seen} ]] && return
    done
    return 1
}

order() {
    local line=$1 guest
    shift
    for guest in "$@"; do
        qemu_order "$guest" "$line"
    done
}

# await EVENT SECONDS GUEST...: relays what the guests say until each named one has had the event.
await() {
    local wanted=$1 seconds=$2 deadline=$((SECONDS + $2))
    shift 2
    while true; do
        guests_relay
        guests_all_had "$wanted" "$@" && return
        guests_alive "$wanted"
        ((SECONDS < deadline)) || guests_fail "time-out: no '$wanted' from $* within $seconds s" "$@"
        pause
    done
}

guests_relay() {
    local guest
    for guest in "${guests[@]}"; do
        while next_line "$guest"; do
            case $LINE in
                "lab: "*) say "  ${guest/#one/guest}: ${LINE#lab: }" ;;
                "lab-event: "*)
                    LINE=${LINE#lab-event: }
                    event["$guest ${LINE%% *}"]=${LINE#* }
                    ;;
            esac
        done
    done
}

# A client that has finished will not hold any more.
guests_all_had() {
    local wanted=$1 guest
    shift
    for guest in "$@"; do
        [[ -n ${event[$guest $wanted]+seen} ]] && continue
        [[ $wanted == holding && -n ${event[$guest finished]+seen} ]] && continue
        return 1
    done
}

guests_alive() {
    local guest
    for guest in "${guests[@]}"; do
        [[ -z ${event[$guest died]+seen} ]] || guests_fail "the guest '$guest' gave up while '$1' was awaited" "$guest"
        qemu_running "$guest" && continue
        [[ -n ${event[$guest shipped]+seen} ]] && continue
        guests_relay
        [[ -n ${event[$guest shipped]+seen} ]] && continue
        guests_fail "the guest '$guest' died while '$1' was awaited" "$guest"
    done
}

# guests_fail MESSAGE GUEST...
guests_fail() {
    local message=$1 guest
    shift
    for guest in "$@"; do
        say "the last lines of $(guest_console "$guest"):"
        tail -n 20 "$(guest_console "$guest")" | sed 's/^/    /'
        sed 's/^/    qemu: /' "$MACHINE/qemu-$guest.log"
    done
    fail "$message; what there is lies in $OUT"
}

guests_exit_code() {
    local guest code
    EXIT_CODE=0
    for guest in "${client_guests[@]}"; do
        code=${event[$guest finished]}
        ((code > EXIT_CODE)) && EXIT_CODE=$code
    done
    ((EXIT_CODE <= 2)) || EXIT_CODE=1 # killed by a signal
}

# What the guests shipped: a tar at the start of each disk.
guests_collect() {
    local guest
    for guest in "${guests[@]}"; do
        guest_await_off "$guest"
        tar -C "$OUT" -xf "$MACHINE/disk-$guest" || fail "what '$guest' shipped can't be read"
    done
    cat "$OUT/machine-${guests[0]}.txt" >>"$OUT/machine.txt"
    for guest in "${guests[@]}"; do
        [[ $guest == one ]] && mv "$OUT/kernel-one.log" "$OUT/kernel.log"
        rm "$OUT/machine-$guest.txt"
    done
}

guest_await_off() {
    local deadline=$((SECONDS + 30))
    while qemu_running "$1" && ((SECONDS < deadline)); do
        pause
    done
    qemu_kill "$1"
}

# The first Ctrl-C asks the clients to end early and write what they have; a second one ends all.
guests_interrupt() {
    [[ -n ${event["all interrupted"]+seen} || -z ${event["${guests[0]:-} ready"]+seen} ]] && exit 1
    event["all interrupted"]=''
    say "ending early: the clients close what they hold and write their records; again to end at once"
    order interrupt "${client_guests[@]}"
}

# Whatever happened: no guest and none of its large files stay behind.
guests_clean() {
    qemu_kill_all
    [[ -z $MACHINE ]] || rm -rf "$MACHINE"
}
