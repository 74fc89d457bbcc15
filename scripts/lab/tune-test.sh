#!/bin/sh
# shellcheck shell=dash
# Applies tune-server and tune-client and takes them back, and compares every value on the way.
#
#   tune-test.sh --fake    on a copy of this machine's settings, which any user may do
#   tune-test.sh --really  on this kernel itself, as root: for a guest that is thrown away
#
# Prints `tune-test: passed` and exits 0, or the first thing that is wrong and exits 1.
set -u

SCRIPTS=$(cd "$(dirname "$0")/.." && pwd)
N=3000000
ROOT=''
KEYS='fs/nr_open fs/file-max fs/epoll/max_user_watches net/core/somaxconn
    net/ipv4/tcp_max_syn_backlog net/ipv4/tcp_max_orphans net/ipv4/tcp_mem net/ipv4/tcp_rmem
    net/ipv4/tcp_wmem net/ipv4/ip_local_port_range net/ipv4/conf/all/rp_filter
    net/netfilter/nf_conntrack_max net/netfilter/nf_conntrack_count'

main() {
    case ${1-} in
        --fake) fake_root ;;
        --really) ;;
        *) fail 'say --fake or --really' ;;
    esac
    before=$(settings)
    printing_changes_nothing
    applying_raises_and_reverting_restores
    applying_twice_is_applying_once
    a_smaller_target_takes_back_what_it_does_not_need
    either_order_of_reverting_restores
    both_at_once_lose_nothing
    nothing_changes_before_the_old_values_are_kept
    nothing_changes_without_a_drop_in
    a_value_that_the_kernel_keeps_is_not_forgotten
    a_state_that_is_gone_is_reported
    the_original_is_applied_or_its_refusal_is_told
    wrong_usage_is_refused
    echo 'tune-test: passed'
}

# The scripts' view of this machine, with a tracker that is in use.
fake_root() {
    ROOT=$(mktemp -d)
    trap 'rm -rf "$ROOT"' EXIT
    for key in $KEYS; do
        mkdir -p "$ROOT/proc/sys/${key%/*}"
        cat "/proc/sys/$key" >"$ROOT/proc/sys/$key" 2>/dev/null || rm -f "$ROOT/proc/sys/$key"
    done
    mkdir -p "$ROOT/proc/sys/net/netfilter"
    echo 262144 >"$ROOT/proc/sys/net/netfilter/nf_conntrack_max"
    echo 7 >"$ROOT/proc/sys/net/netfilter/nf_conntrack_count"
    echo 1 >"$ROOT/proc/sys/net/ipv4/conf/all/rp_filter"
    grep MemTotal /proc/meminfo >"$ROOT/proc/meminfo"
}

printing_changes_nothing() {
    server -c "$N" >/dev/null
    client -c "$N" >/dev/null
    expect_as_before 'printing'
    [ "$(client -c "$N" --ports 1 2>&1 | grep -c 'too few')" = 1 ] ||
        fail 'that the 5-tuples are too few is not told once'
    server --revert | grep -q 'nothing is applied' || fail 'a revert of nothing does not say so'
}

applying_raises_and_reverting_restores() {
    server -c "$N" --apply >/dev/null || fail 'the server is not applied'
    at_least fs/nr_open $((N + 132))
    at_least fs/file-max $((2 * N))
    at_least fs/epoll/max_user_watches $((2 * N))
    at_least net/core/somaxconn 4096
    at_least net/ipv4/tcp_max_syn_backlog 4096
    at_least net/ipv4/tcp_max_orphans "$N"
    [ -z "$ROOT" ] || at_least net/netfilter/nf_conntrack_max "$N"
    grep -q "^fs.nr_open = $(value fs/nr_open)\$" "$ROOT/etc/sysctl.d/90-c1000k-server.conf" ||
        fail 'the drop-in does not hold fs.nr_open'
    grep -q "^root hard nofile $((N + 132))\$" "$ROOT/etc/security/limits.d/90-c1000k-server.conf" ||
        fail 'the drop-in does not hold the descriptor limit'
    server --revert >/dev/null || fail 'the server is not reverted'
    expect_as_before 'reverting the server'
}

applying_twice_is_applying_once() {
    client -c "$N" --ports 40 --sources 2 --apply >/dev/null || fail 'the client is not applied'
    [ "$(value net/ipv4/ip_local_port_range)" = '10000 65535' ] || fail 'the port range is not widened'
    [ -z "$ROOT" ] || [ "$(value net/ipv4/conf/all/rp_filter)" = 2 ] || fail 'rp_filter is still strict'
    once=$(settings && drop_ins)
    client -c "$N" --ports 40 --sources 2 --apply >/dev/null || fail 'the client is not applied again'
    [ "$(settings && drop_ins)" = "$once" ] || fail 'applying twice differs from once'
    client --revert >/dev/null || fail 'the client is not reverted'
    expect_as_before 'reverting the client'
}

a_smaller_target_takes_back_what_it_does_not_need() {
    server -c "$N" --apply >/dev/null
    server -c 1 --ports 1 --apply >/dev/null || fail 'a smaller target is not applied'
    [ "$(value fs/nr_open)" = "$(echo "$before" | sed -n 's/^fs.nr_open //p')" ] ||
        fail 'a smaller target leaves fs.nr_open raised'
    server --revert >/dev/null
    expect_as_before 'reverting a smaller target'
}

either_order_of_reverting_restores() {
    for first in server client; do
        server -c "$N" --apply >/dev/null
        client -c 2M --apply >/dev/null
        at_least fs/nr_open $((N + 132))
        "$first" --revert >/dev/null
        at_least fs/nr_open 2000032
        server --revert >/dev/null
        client --revert >/dev/null
        expect_as_before "reverting the $first first"
    done
}

both_at_once_lose_nothing() {
    for round in 1 2 3; do
        server -c "$N" --apply >/dev/null &
        client -c 2M --ports 40 --apply >/dev/null &
        wait
        at_least fs/nr_open $((N + 132))
        [ "$(value net/ipv4/ip_local_port_range)" = '10000 65535' ] || fail 'the client at once is not applied'
        server --revert >/dev/null &
        client --revert >/dev/null &
        wait
        expect_as_before "applying and reverting both at once, round $round,"
    done
}

# A file where a folder should be is as good as a file system that can't be written, and works for root too.
nothing_changes_before_the_old_values_are_kept() {
    [ -n "$ROOT" ] || return 0
    mkdir -p "$ROOT/var/lib" && : >"$ROOT/var/lib/c1000k"
    ! server -c "$N" --apply >/dev/null 2>&1 || fail 'an apply that can not keep the old values succeeds'
    expect_as_before 'an apply that can not keep the old values'
    rm "$ROOT/var/lib/c1000k"
    rm -rf "$ROOT/run" && : >"$ROOT/run"
    server -c "$N" --apply 2>&1 | grep -q "can't write .* nothing is changed" || fail 'a missing lock is not reported'
    expect_as_before 'an apply that can not lock'
    rm "$ROOT/run"
}

nothing_changes_without_a_drop_in() {
    [ -n "$ROOT" ] || return 0
    mkdir -p "$ROOT/etc" && rm -rf "$ROOT/etc/sysctl.d" && : >"$ROOT/etc/sysctl.d"
    ! server -c "$N" --apply >/dev/null 2>&1 || fail 'an apply that can not write its drop-in succeeds'
    rm "$ROOT/etc/sysctl.d"
    server --revert >/dev/null || fail 'an apply without its drop-in is not reverted'
    expect_as_before 'an apply that can not write its drop-in'
}

# A setting that even root may not write stands in for a /proc/sys that is read-only.
a_value_that_the_kernel_keeps_is_not_forgotten() {
    [ -n "$ROOT" ] || return 0
    server -c "$N" --apply >/dev/null
    mv "$ROOT/proc/sys/fs/nr_open" "$ROOT/kept"
    ln -s /proc/sys/kernel/ngroups_max "$ROOT/proc/sys/fs/nr_open"
    ! server --revert >/dev/null 2>&1 || fail 'a revert that the kernel refuses succeeds'
    grep -q '^fs.nr_open ' "$ROOT/var/lib/c1000k/previous" || fail 'the value of a refused revert is forgotten'
    mv "$ROOT/kept" "$ROOT/proc/sys/fs/nr_open"
    server --revert >/dev/null || fail 'a refused revert can not be done again'
    expect_as_before 'a revert that was refused at first'
}

a_state_that_is_gone_is_reported() {
    [ -n "$ROOT" ] || return 0
    server -c "$N" --apply >/dev/null
    cp "$ROOT/var/lib/c1000k/previous" "$ROOT/kept"
    rm -r "$ROOT/var/lib/c1000k"
    ! told=$(server --revert 2>&1) || fail "a revert without the old values succeeds: $told"
    echo "$told" | grep -q 'previous is gone' || fail "missing old values are not reported: $told"
    mkdir "$ROOT/var/lib/c1000k" && mv "$ROOT/kept" "$ROOT/var/lib/c1000k/previous"
    server --revert >/dev/null || fail 'a state that was found again is not reverted'
    expect_as_before 'a state that was gone'
}

# Some kernels (Debian's 6.1.192) refuse a tcp_rmem below 4096; then that has to be said.
the_original_is_applied_or_its_refusal_is_told() {
    told=$(server --original --apply 2>&1)
    if [ "$(value net/ipv4/tcp_rmem)" != '512 512 1024' ]; then
        echo "$told" | grep -q 'tcp_rmem stays at .* the kernel refuses 512 512 1024' ||
            fail 'tcp_rmem is not the original, and nothing is said of it'
    fi
    [ "$(value net/ipv4/tcp_wmem)" = '512 512 1024' ] || fail 'tcp_wmem is not the original'
    at_least fs/nr_open 2000000
    at_least net/ipv4/tcp_mem 524288
    server --revert >/dev/null || fail 'the original is not reverted'
    expect_as_before 'reverting the original'
}

wrong_usage_is_refused() {
    server --apply --revert >/dev/null 2>&1
    [ $? -eq 2 ] || fail '--apply --revert is not refused as wrong usage'
    for arguments in '-c' '-c 0' '-c ten' '--ports -1' '--nonsense' '--root /no/such/directory'; do
        # shellcheck disable=SC2086 # they are several words
        "$SCRIPTS/tune-server" $arguments >/dev/null 2>&1
        [ $? -eq 2 ] || fail "$arguments is not refused as wrong usage"
    done
}

server() {
    tune server "$@"
}

client() {
    tune client "$@"
}

tune() {
    script=$SCRIPTS/tune-$1
    shift
    if [ -n "$ROOT" ]; then "$script" --root "$ROOT" "$@"; else "$script" "$@"; fi
}

settings() {
    for key in $KEYS; do
        case $key in *_count) continue ;; esac
        [ ! -f "$ROOT/proc/sys/$key" ] || echo "$key $(value "$key")"
    done
}

drop_ins() {
    cat "$ROOT"/etc/sysctl.d/90-c1000k-* "$ROOT"/etc/security/limits.d/90-c1000k-* \
        "$ROOT"/etc/modules-load.d/90-c1000k-* "$ROOT/var/lib/c1000k/previous" 2>/dev/null
}

value() {
    tr -s '\t' ' ' <"$ROOT/proc/sys/$1"
}

at_least() {
    now=$(value "$1")
    [ "${now%% *}" -ge "$2" ] || fail "$1 is $now, not $2"
}

expect_as_before() {
    now=$(settings)
    [ "$now" = "$before" ] || fail "$1 leaves
$now
where there was
$before"
    left=$(drop_ins)
    [ -z "$left" ] || fail "$1 leaves $left"
}

fail() {
    echo "tune-test: $*" >&2
    exit 1
}

main "$@"
