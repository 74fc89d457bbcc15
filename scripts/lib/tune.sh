# shellcheck shell=dash
# The common part of tune-server and tune-client: prints what N connections need according to the program, writes it to
# separate drop-ins and to the running kernel, and reverts it.
#
# A value is never lowered (except by --original): it becomes the highest of the previous value, the value that N needs
# and the value that the other script has applied. The previous value is kept in a state file shared by both scripts, so
# that they may be applied and reverted in any order. Three rules keep it correct: nothing changes before the previous
# value is on disk; a value is removed only when no drop-in sets the key any more and the kernel has that value again; and
# a lock lets only one script run at a time.
#
# It runs under any POSIX shell, including busybox's, and needs flock(1) but not sysctl(8).
# Uses LIB, set by the two scripts.

CONNECTIONS=1M PORTS=100 SOURCES=1 TUNE_ROOT='' MODE=print ORIGINAL='' FAILED=0

# tune ROLE PROGRAM TCP_MEM BUFFERS ARGUMENTS...: the program may be empty; the values are those of the original test.
tune() {
    ROLE=$1 PROGRAM=$2 ORIGINAL_TCP_MEM=$3 ORIGINAL_BUFFERS=$4
    shift 4
    parse "$@"
    SYSCTLS=$TUNE_ROOT/etc/sysctl.d/90-c1000k-$ROLE.conf
    LIMITS=$TUNE_ROOT/etc/security/limits.d/90-c1000k-$ROLE.conf
    MODULES=$TUNE_ROOT/etc/modules-load.d/90-c1000k-$ROLE.conf
    STATE=$TUNE_ROOT/var/lib/c1000k/previous
    HEADER="# By scripts/tune-$ROLE for $CONNECTIONS connections; scripts/tune-$ROLE --revert reverts it."
    case $MODE in
        print) make_plan && show || return ;;
        apply) lock && make_plan || return; apply ;;
        revert) lock || return; revert ;;
    esac
    return "$FAILED"
}

usage() {
    cat <<TEXT
scripts/tune-$ROLE [OPTIONS]: set up this machine's kernel for a $ROLE of N connections

  -c, --connections N  connections, as in 10k or 1M (default 1M)
      --ports N        listening ports of the server (default 100)
      --sources N      source addresses of the client (default 1)
      --original       use the values of the original test, with tiny socket buffers
      --apply          apply the settings now and at each boot
      --revert         restore the previous values
      --root DIR       treat DIR as / (for tests)

Without --apply and --revert it prints what it would write, and changes nothing. It gets the requirements from
c1000k-$ROLE: the program that C1000K_SERVER or C1000K_CLIENT names, or the one built here, or the one on PATH.
TEXT
}

parse() {
    while [ $# -gt 0 ]; do
        case $1 in
            -c | --connections | --ports | --sources | --root)
                [ $# -gt 1 ] || misuse "$1 needs a value"
                case $1 in
                    --ports) PORTS=$2 ;;
                    --sources) SOURCES=$2 ;;
                    --root) [ -d "$2" ] && TUNE_ROOT=$2 || misuse "$2 is not a directory" ;;
                    *) CONNECTIONS=$2 ;;
                esac
                shift
                ;;
            --original) ORIGINAL=1 ;;
            --apply | --revert)
                [ "$MODE" = print ] || [ "$MODE" = "${1#--}" ] || misuse "--apply and --revert exclude each other"
                MODE=${1#--}
                ;;
            -h | --help) usage && exit 0 ;;
            *) misuse "unknown argument $1" ;;
        esac
        shift
    done
}

misuse() {
    echo "scripts/tune-$ROLE: $*; see scripts/tune-$ROLE --help" >&2
    exit 2
}

fail() {
    echo "scripts/tune-$ROLE: $*" >&2
    FAILED=1
}

refuse() {
    fail "$*, so nothing is changed"
    return 1
}

# Held until this process ends, however it ends. busybox's flock has no time-out, so it is retried once a second.
lock() {
    local file=$TUNE_ROOT/run/c1000k-tune.lock seconds_max=30
    [ -n "$TUNE_ROOT" ] || [ "$(id -u)" -eq 0 ] || { refuse "--$MODE writes to /proc/sys and /etc: run it as root" || return; }
    mkdir -p "${file%/*}" 2>/dev/null
    { true >>"$file"; } 2>/dev/null || { refuse "can't write $file" || return; }
    command -v flock >/dev/null || { refuse 'flock is missing (Debian: apt-get install util-linux)' || return; }
    exec 9>>"$file"
    for _ in $(seq "$seconds_max"); do
        if flock -n 9; then
            [ ! -e "$STATE" ] || cat "$STATE" >/dev/null 2>&1 || refuse "can't read $STATE, which holds the values from before"
            return
        fi
        sleep 1
    done
    refuse "the other script has held the lock for $seconds_max s ($file)"
}

# Gets the requirements from the program and sets PLAN. They must include the descriptor limit, even if
# registered files are not available.
make_plan() {
    local built=${CARGO_TARGET_DIR:-$LIB/../../target}/release/c1000k-$ROLE
    [ -x "$built" ] || built=c1000k-$ROLE
    PROGRAM=${PROGRAM:-$built}
    if ! command -v "$PROGRAM" >/dev/null; then
        fail "there is no program $PROGRAM: build it by cargo build --release -p c1000k-$ROLE; --help names others"
        return 1
    fi
    set -- --connections "$CONNECTIONS" --ports "$PORTS" --file-table process --root "${TUNE_ROOT:-/}"
    # An address for documentation stands for a remote server. Nothing connects to it.
    [ "$ROLE" = server ] || set -- "$@" --sources "$SOURCES" 192.0.2.1
    REQUIREMENTS=$("$PROGRAM" --check --print sysctl "$@") || return
    if [ -n "$ORIGINAL" ]; then
        SETTINGS=$(original)
    else
        printf '%s\n' "$REQUIREMENTS" | sed -n 's/^#note: /note: /p' >&2
        SETTINGS=$(needed)
    fi
    PLAN=$(plan)
}

# Each setting as key|mark|value|purpose, where the mark is `enough`, `exactly` or nothing.
needed() {
    printf '%s\n' "$REQUIREMENTS" | awk '
        /^# / { purpose = substr($0, 3) }
        /^#limits.d: root hard nofile / { print "limit.nofile||" $NF "|descriptors of a process" }
        / = / { mark = sub(/^#/, "") ? "enough" : ""; key = $1; sub(/^[^=]*= /, ""); print key "|" mark "|" $0 "|" purpose }'
}

original() {
    cat <<TEXT
limit.nofile||2000000|descriptors of a process
fs.nr_open||2000000|the highest descriptor limit that a process may be given
fs.file-max||2000000|open files of the whole system
net.ipv4.tcp_mem||$ORIGINAL_TCP_MEM|pages for queued data
net.ipv4.tcp_wmem|exactly|$ORIGINAL_BUFFERS|bytes: tiny send buffers
net.ipv4.tcp_rmem|exactly|$ORIGINAL_BUFFERS|bytes: tiny receive buffers; ssh may break
TEXT
    needed | awk -F '|' '$1 == "net.netfilter.nf_conntrack_max" { print $1 "||2000000|" $4 }'
}

# Each setting of this kernel as key|before|value|purpose, where value is the new one.
plan() {
    printf '%s\n' "$SETTINGS" | while IFS='|' read -r key mark needed purpose; do
        kept=$(before_of "$key")
        before=${kept:-$(value_of "$key")}
        [ -n "$before" ] || continue
        case $mark${kept:+kept} in
            exactly*) value=$needed ;;
            enough) value=$before ;;
            *) value=$(merge "$key" "$before" "$needed" "$(other_of "$key")") ;;
        esac
        echo "$key|$before|$value|$purpose"
    done
}

# merge KEY VALUE...: the highest of each number; for a range the lowest start and the highest end.
merge() {
    local key=$1
    shift
    printf '%s\n' "$@" | awk -v range="$([ "$key" != net.ipv4.ip_local_port_range ] || echo 1)" '
        { for (i = 1; i <= NF; i++) if (NR == 1 || (range && i == 1 ? $i < best[i] : $i > best[i])) best[i] = $i }
        NR == 1 { count = NF }
        END { for (i = 1; i <= count; i++) printf "%s%s", best[i], i < count ? " " : "\n" }'
}

changes() {
    printf '%s\n' "$PLAN" | awk -F '|' '$2 != $3'
}

file_of() {
    echo "$TUNE_ROOT/proc/sys/$(echo "$1" | tr . /)"
}

# The present value, its numbers separated by one space; empty if this kernel has no such setting or no limit.
value_of() {
    if [ "$1" = limit.nofile ]; then
        ulimit -Hn | grep -v unlimited
    else
        tr -s '\t' ' ' 2>/dev/null <"$(file_of "$1")" | sed 's/ *$//'
    fi
}

# The value before any --apply.
before_of() {
    awk -v key="$1" '$1 == key { sub(/^[^ ]* /, ""); print }' "$STATE" 2>/dev/null
}

# set_in FILE KEY: the value that a drop-in sets.
set_in() {
    awk -v key="$2" '
        $1 == key && $2 == "=" { sub(/^[^=]*= /, ""); print }
        key == "limit.nofile" && $1 == "root" && $2 == "hard" && $3 == "nofile" { print $4 }' "$1" 2>/dev/null
}

# What the other script's drop-ins set, or with `all` those of both.
other_of() {
    local file
    for file in "$TUNE_ROOT"/etc/sysctl.d/90-c1000k-*.conf "$TUNE_ROOT"/etc/security/limits.d/90-c1000k-*.conf; do
        { [ "$file" = "$SYSCTLS" ] || [ "$file" = "$LIMITS" ]; } && [ "${2:-}" != all ] || set_in "$file" "$1"
    done
}

sysctl_text() {
    changes | grep -v '^limit' | awk -F '|' -v header="$HEADER" '
        NR == 1 { print header }
        { printf "# %s; before: %s\n%s = %s\n", $4, $2, $1, $3 }'
}

# `*` is every user except root. The programs raise their soft limit themselves; a soft limit above 1024 for all users
# breaks programs that still use select(2). The original sets one, and a stack for its array of events, in KiB.
limits_text() {
    changes | grep '^limit' | while IFS='|' read -r _ before value purpose; do
        printf '%s\n# %s; before: %s\n' "$HEADER" "$purpose" "$before"
        for who in '*   ' root; do
            echo "$who hard nofile $value"
            [ -z "$ORIGINAL" ] || printf "$who %s\n" "soft nofile $value" 'hard stack 12000' 'soft stack 12000'
        done
    done
}

# The module must be loaded before its limit is set at boot.
modules_text() {
    ! changes | grep -q '^net.netfilter' || printf '%s\n' "$HEADER" nf_conntrack
}

show() {
    show_file "$SYSCTLS" "$(sysctl_text)"
    show_file "$LIMITS" "$(limits_text)"
    show_file "$MODULES" "$(modules_text)"
    printf '%s\n' "$PLAN" | awk -F '|' '
        $2 == $3 && !shown++ { print "Enough as they are:" }
        $2 == $3 { printf "  %-32s %s\n", $1, $2 }'
    [ -n "$ORIGINAL" ] || echo 'Unchanged: tcp_rmem and tcp_wmem (tiny ones save nothing), the stack limit.'
    echo "A service takes its limit from its unit: LimitNOFILE=$(printf '%s\n' "$SETTINGS" | awk -F '|' '/^limit/ { print $3 }')"
    echo 'Nothing is changed. As root, --apply applies it and --revert reverts it.'
}

show_file() {
    [ -z "$2" ] || printf '%s\n' "--- ${1#"$TUNE_ROOT"}" "$2" ''
}

apply() {
    remember || { refuse 'the values from before can not be kept' || return; }
    if write_file "$SYSCTLS" "$(sysctl_text)" && write_file "$MODULES" "$(modules_text)"; then
        while IFS='|' read -r key before value purpose; do
            set_value "$key" "$value"
        done <<TEXT
$PLAN
TEXT
        # A descriptor limit above fs.nr_open locks all users out: the login can't set it and ends.
        limit=$(changes | awk -F '|' '/^limit/ { print $3 }')
        if [ -z "$limit" ] || [ "$(value_of fs.nr_open)" -ge "$limit" ]; then
            write_file "$LIMITS" "$(limits_text)"
        else
            fail "fs.nr_open is below $limit, so ${LIMITS#"$TUNE_ROOT"} is not written"
        fi
    else
        fail 'without its drop-in a setting would be lost at the next boot, so the kernel is left as it is'
    fi
    forget
    [ "$FAILED" -ne 0 ] || echo "applied for $CONNECTIONS connections; a new descriptor limit applies from the next login"
}

revert() {
    if [ -f "$STATE" ]; then
        while read -r key before; do
            other=$(other_of "$key")
            set_value "$key" "${other:-$before}"
        done <"$STATE"
    elif [ -f "$SYSCTLS" ] || [ -f "$LIMITS" ] || [ -f "$MODULES" ]; then
        fail "$STATE is gone: the drop-ins are removed, and the kernel's values stay until the next boot"
    else
        echo 'nothing is applied'
        return
    fi
    for file in "$SYSCTLS" "$LIMITS" "$MODULES"; do
        write_file "$file" ''
    done
    forget
    [ "$FAILED" -ne 0 ] || echo 'reverted'
}

set_value() {
    [ "$1" != limit.nofile ] && [ "$(value_of "$1")" != "$2" ] || return 0
    if ! { echo "$2" >"$(file_of "$1")"; } 2>/dev/null || [ "$(value_of "$1")" != "$2" ]; then
        fail "$1 stays at $(value_of "$1"), the kernel refuses $2"
    fi
}

# Keeps the present value if none is kept yet and it is going to change.
remember() {
    write_file "$STATE" "$(
        cat "$STATE" 2>/dev/null
        changes | while IFS='|' read -r key before value purpose; do
            [ -n "$(before_of "$key")" ] || echo "$key $before"
        done
    )"
}

# Removes values that are restored and that no drop-in sets any more, and finally the state file.
forget() {
    [ -f "$STATE" ] || return 0
    # The limit of a login exists only in its drop-in.
    write_file "$STATE" "$(while read -r key before; do
        [ -z "$(other_of "$key" all)" ] && { [ "$key" = limit.nofile ] || [ "$(value_of "$key")" = "$before" ]; } ||
            echo "$key $before"
    done <"$STATE")"
    [ -f "$STATE" ] || rmdir "${STATE%/*}" 2>/dev/null || true
}

# write_file FILE TEXT: writes the complete text to disk, or nothing; without a text it removes the file.
write_file() {
    if [ -z "$2" ]; then
        rm -f "$1" 2>/dev/null && return
    else
        { mkdir -p "${1%/*}" && printf '%s\n' "$2" >"$1.new" && { sync "$1.new" || sync; } && mv "$1.new" "$1"; } \
            2>/dev/null && return
    fi
    rm -f "$1.new" 2>/dev/null
    fail "can't write $1"
    return 1
}
