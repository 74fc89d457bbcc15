# shellcheck shell=bash
# Server and client as processes of this machine: over loopback, or in namespaces.sh's three hosts.
# Uses say.sh, follow.sh, snapshot.sh, namespaces.sh; sets EXIT_CODE.

readonly HOLD_SECONDS=5
readonly READY_SECONDS=20
readonly STALL_SECONDS=5
readonly TEARDOWN_SECONDS=60 # and a second more for each 10,000 connections

declare -A process_of=() # host or client name -> pid of the process that runs there
declare -A held=()       # client name -> its log said that it is holding
interrupted=''
peak_taken=''

# native_run TOPOLOGY CONNECTIONS
native_run() {
    PATH=$BINARIES:$PATH
    native_plan "$1" "$2"
    trap native_interrupt INT TERM
    native_start_server
    native_snapshots before
    native_start_clients
    native_watch_clients "$2"
    native_collect_exit_codes
    native_await_teardown "$2"
    native_snapshots after
    native_stop_server
    native_snapshots end
    trap - INT TERM
}

# Who runs where: `hosts` for the snapshots, `clients` with the address and share of each.
native_plan() {
    declare -gA server_address=() share=()
    if [[ $1 == three-hosts ]]; then
        namespaces_create "$2"
        hosts=(server client-1 client-2) clients=(client-1 client-2)
        share=([client-1]=$((($2 + 1) / 2)) [client-2]=$(($2 / 2)))
        server_address=([client-1]=$SERVER_ADDRESS_1 [client-2]=$SERVER_ADDRESS_2)
    else
        hosts=(one) clients=(client)
        share=([client]=$2)
        server_address=([client]=127.0.0.1)
    fi
}

# on HOST COMMAND...: where that host is. A process here has no terminal: Ctrl-C reaches this
# script alone, which then ends the others in order. It works in the folder of the run, so that the
# records name no path of this machine. Should memory run out, it is what the kernel ends first.
on() {
    local ENTER=()
    ! namespaces_in_use || namespace_enter "$1"
    cd "$OUT" || exit
    echo 1000 >/proc/self/oom_score_adj
    exec setsid "${ENTER[@]}" "${@:2}"
}

native_start_server() {
    local bind=127.0.0.1
    namespaces_in_use && bind=0.0.0.0
    (on server c1000k-server --bind "$bind" --json server.json) \
        >"$OUT/server.log" 2>&1 &
    process_of[server]=$!
    follow server "$OUT/server.log"
    native_await_ready
}

native_await_ready() {
    local deadline=$((SECONDS + READY_SECONDS))
    while running server; do
        while next_line server; do
            [[ " $LINE" == *[[:space:]]ready* ]] && return
        done
        ((SECONDS < deadline)) || native_no_server "did not get ready within $READY_SECONDS s"
        pause
    done
    native_no_server "could not be started"
}

native_no_server() {
    tail -n 5 "$OUT/server.log" >&2
    fail "the server $1; its last lines are above"
}

native_start_clients() {
    local client
    for client in "${clients[@]}"; do
        (on "$client" c1000k-client "${server_address[$client]}" "$FIRST_PORT" \
            -c "${share[$client]}" --hold "${HOLD_SECONDS}s" --json "$client.json") \
            >"$OUT/$client.log" 2>&1 &
        process_of[$client]=$!
        follow "$client" "$OUT/$client.log"
    done
}

# Relays the clients' logs until all have ended; takes the peak when all of them hold. Past the
# time-out they get as long as a teardown to end by themselves.
native_watch_clients() {
    local deadline=$((SECONDS + 60 + $1 / 200)) told=''
    while native_relay_clients; do
        native_take_peak
        if ((SECONDS >= deadline)) && [[ -z $told ]]; then
            say "time-out: the clients were not done after $((60 + $1 / 200)) s; ending them"
            native_interrupt
            told=yes
        fi
        ((SECONDS < deadline + TEARDOWN_SECONDS)) ||
            fail "the clients did not end within $TEARDOWN_SECONDS s; what there is lies in $OUT"
        pause
    done
}

# Fails once no client runs and all they wrote has been shown.
native_relay_clients() {
    local client alive=1
    for client in "${clients[@]}"; do
        running "$client" && alive=0
        while next_line "$client"; do
            say "  $client: $LINE"
            [[ $LINE == *"holding "*" connections"* ]] && native_client_holds "$client"
        done
    done
    return "$alive"
}

# A client that holds waits, stopped, until all of them do: then the peak is one moment. Its
# connections stay up meanwhile, for they are the kernel's.
native_client_holds() {
    held[$1]=yes
    kill -STOP "${process_of[$1]}" 2>/dev/null || true
}

native_take_peak() {
    local client
    [[ -n $peak_taken || ${#held[@]} -eq 0 ]] && return
    for client in "${clients[@]}"; do
        [[ -z ${held[$client]:-} ]] && running "$client" && return
    done
    native_snapshots peak
    peak_taken=yes
    native_let_clients_go
}

native_let_clients_go() {
    local client
    for client in "${clients[@]}"; do
        kill -CONT "${process_of[$client]}" 2>/dev/null || true
    done
}

# Ctrl-C or a time-out: the clients end early and write what they have; a second one ends at once.
native_interrupt() {
    local client
    [[ -n $interrupted ]] && exit 1
    interrupted=yes
    say "ending early: the clients close what they hold and write their records"
    for client in "${clients[@]}"; do
        kill -INT "${process_of[$client]:-}" 2>/dev/null || true
    done
    native_let_clients_go
}

native_collect_exit_codes() {
    local client code
    EXIT_CODE=0
    for client in "${clients[@]}"; do
        code=0
        wait "${process_of[$client]}" || code=$?
        ((code > EXIT_CODE)) && EXIT_CODE=$code
    done
    ((EXIT_CODE <= 2)) || EXIT_CODE=1 # killed by a signal
}

# The server still runs; its sockets go as it reads that their peers are gone, and the clients' as the kernel clears up
# behind them. The kernel's count of both is at hand, where its list of a million takes seconds to read each time; but
# other processes' sockets are in it, so once there have not been fewer for a while, no more is waited.
native_await_teardown() {
    local deadline=$((SECONDS + TEARDOWN_SECONDS + $1 / 10000)) stalled=$((SECONDS + STALL_SECONDS)) before fewest now
    before=$(native_sockets "$OUT/snapshots/${hosts[0]}/before/sockstat")
    fewest=$(native_sockets /proc/net/sockstat)
    while ((fewest > before + 50 && SECONDS < deadline && SECONDS < stalled)); do
        pause
        now=$(native_sockets /proc/net/sockstat)
        ((now < fewest)) || continue
        fewest=$now stalled=$((SECONDS + STALL_SECONDS))
    done
}

# TCP sockets of all namespaces that are allocated, those that were reset and are not freed yet included.
native_sockets() {
    awk '$1 == "TCP:" { print $9 }' "$1"
}

native_snapshots() {
    local host pid
    for host in "${hosts[@]}"; do
        pid=''
        [[ $host != client-* && $1 != end ]] && pid=${process_of[server]}
        # shellcheck disable=SC2016 # expanded by the inner shell
        (on "$host" sh -c '. "$0"; snapshot "$@"' "$LAB/snapshot.sh" "$OUT/snapshots/$host/$1" "$pid")
    done
}

native_stop_server() {
    local code=0 deadline=$((SECONDS + TEARDOWN_SECONDS))
    kill -TERM "${process_of[server]}" 2>/dev/null || true
    while running server && ((SECONDS < deadline)); do
        pause
    done
    running server && kill -KILL "${process_of[server]}"
    wait "${process_of[server]}" || code=$?
    ((code == 0)) || say "the server ended with code $code: see $OUT/server.log"
}

running() {
    [[ -n ${process_of[$1]:-} ]] && kill -0 "${process_of[$1]}" 2>/dev/null
}

# Whatever happened: nothing of ours stays behind.
native_clean() {
    local name
    for name in "${!process_of[@]}"; do
        kill -KILL "${process_of[$name]}" 2>/dev/null || true
    done
    namespaces_remove
}
