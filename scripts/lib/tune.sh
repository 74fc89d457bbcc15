# shellcheck shell=dash
# The common part of tune-server and tune-client: prints the plan, writes it to drop-ins of their
# own and to the running kernel, and takes it back.
#
# What was there before is kept in the state file, once for both scripts, so that they may be
# applied and reverted in any order. Three rules keep it true: nothing changes before the value
# that was there is on disk; a value is forgotten only when no drop-in sets the key any more and
# the kernel holds that value again; and one script at a time works, behind a lock.
#
# It runs under any POSIX shell, busybox's included, and needs flock(1) but no sysctl(8).

# shellcheck source-path=SCRIPTDIR source=tune-plan.sh
. "$LIB/tune-plan.sh"

CONNECTIONS=1000000
PORTS=100
SOURCES=1
TUNE_ROOT=''
MODE=print
WANTS=settings
FAILED=0
readonly LOCK_SECONDS=30 # for the other script to end

tune() {
    parse "$@"
    SYSCTLS=$TUNE_ROOT/etc/sysctl.d/90-c1000k-$ROLE.conf
    LIMITS=$TUNE_ROOT/etc/security/limits.d/90-c1000k-$ROLE.conf
    MODULES=$TUNE_ROOT/etc/modules-load.d/90-c1000k-$ROLE.conf
    STATE=$TUNE_ROOT/var/lib/c1000k/previous
    case $MODE in
        print) cautions; show ;;
        apply) must_be_root && lock && state_can_be_read || return; cautions; apply ;;
        revert) must_be_root && lock && state_can_be_read || return; revert ;;
    esac
    return "$FAILED"
}

# Held until this process ends, however it ends.
lock() {
    local file=$TUNE_ROOT/run/c1000k-tune.lock
    mkdir -p "${file%/*}" 2>/dev/null
    if ! { true >>"$file"; } 2>/dev/null; then
        fail "can't write $file, so nothing is changed"
        return 1
    fi
    if ! command -v flock >/dev/null; then
        fail 'flock is missing (Debian: apt-get install util-linux), so nothing is changed'
        return 1
    fi
    exec 9>>"$file"
    # busybox's flock knows no time-out.
    waited=0
    until flock -n 9; do
        if [ "$waited" -ge "$LOCK_SECONDS" ]; then
            fail "the other script has been at work for $LOCK_SECONDS s ($file), so nothing is changed"
            return 1
        fi
        sleep 1
        waited=$((waited + 1))
    done
}

state_can_be_read() {
    [ ! -e "$STATE" ] || cat "$STATE" >/dev/null 2>&1 && return
    fail "can't read $STATE, which holds the values from before: nothing is changed"
    return 1
}

usage() {
    cat <<TEXT
scripts/tune-$ROLE [OPTIONS]: set up this machine's kernel for a $ROLE of N connections

  -c, --connections N  1,000,000 if left out; 10k and 1M are understood
      --ports N        listening ports of the server, 100 if left out
      --sources N      source addresses of the client, 1 if left out
      --original       the values of the original test instead, tiny socket buffers included
      --apply          do it, now and for each start of the machine
      --revert         take it back, to the values that were there before
      --root DIR       treat DIR as / (for tests)

Without --apply and --revert it prints what it would write, and changes nothing.
TEXT
}

parse() {
    while [ $# -gt 0 ]; do
        case $1 in
            -c | --connections | --ports | --sources | --root)
                [ $# -gt 1 ] || misuse "$1 needs a value"
                parse_value "$1" "$2"
                shift
                ;;
            --original) WANTS=original_settings ;;
            --apply | --revert)
                [ "$MODE" = print ] || [ "$MODE" = "${1#--}" ] ||
                    misuse "--apply and --revert exclude each other"
                MODE=${1#--}
                ;;
            -h | --help) usage && exit 0 ;;
            *) misuse "$1 is not understood" ;;
        esac
        shift
    done
}

parse_value() {
    # shellcheck disable=SC2034 # SOURCES is for tune-client
    case $1 in
        -c | --connections) CONNECTIONS=$(count_of "$2") || misuse "$2 is no count" ;;
        --ports) PORTS=$(count_of "$2") || misuse "$2 is no count" ;;
        --sources) SOURCES=$(count_of "$2") || misuse "$2 is no count" ;;
        --root)
            [ -d "$2" ] || misuse "$2 is no directory"
            TUNE_ROOT=$2
            ;;
    esac
}

# 10k -> 10000, 1M -> 1000000; fails on all that is not a count of at least one.
count_of() {
    local digits zeros=''
    case $1 in
        *[kK]) digits=${1%?} zeros=000 ;;
        *[mM]) digits=${1%?} zeros=000000 ;;
        *) digits=$1 ;;
    esac
    case $digits in
        '' | 0* | *[!0-9]* | ??????????*) return 1 ;;
    esac
    echo "$digits$zeros"
}

misuse() {
    echo "scripts/tune-$ROLE: $*; see scripts/tune-$ROLE --help" >&2
    exit 2
}

fail() {
    echo "scripts/tune-$ROLE: $*" >&2
    FAILED=1
}

note() {
    echo "note: $*" >&2
}

must_be_root() {
    if [ -z "$TUNE_ROOT" ] && [ "$(id -u)" -ne 0 ]; then
        fail "--$MODE writes to /proc/sys and /etc: run it as root"
        return 1
    fi
}

sysctl_text() {
    header
    plan | changes | while IFS='|' read -r key before value why; do
        printf '# %s; before: %s\n%s = %s\n' "$why" "$before" "$key" "$value"
    done
}

# `*` is everyone but root. Programs raise their soft limit by themselves; a soft limit above 1024
# for everyone breaks those that still use select(2).
limits_text() {
    header
    plan_nofile | changes | while IFS='|' read -r key before value why; do
        printf '# descriptors of a process; before: %s\n' "$before"
        printf '%-4s hard nofile %s\n' '*' "$value" root "$value"
        [ "$WANTS" != original_settings ] || original_limits "$value"
    done
}

# The rest of the original's advice: its soft limit, and a stack for its array of events, in KiB.
original_limits() {
    printf '%-4s soft nofile %s\n' '*' "$1" root "$1"
    for kind in hard soft; do
        printf '%-4s %s stack 12000\n' '*' "$kind" root "$kind"
    done
}

# The module must be there when the machine's start sets its limit.
modules_text() {
    plan | changes | grep -q '^net.netfilter.nf_conntrack_max' || return 0
    header
    echo nf_conntrack
}

header() {
    echo "# By scripts/tune-$ROLE for $CONNECTIONS connections; its --revert takes this back."
}

# Whether a text has more in it than its comments.
says_something() {
    printf '%s' "$1" | grep -q '^[^#]'
}

show() {
    show_file "$SYSCTLS" "$(sysctl_text)"
    show_file "$LIMITS" "$(limits_text)"
    show_file "$MODULES" "$(modules_text)"
    { plan && plan_nofile; } | awk -F '|' '
        $2 == $3 && !told++ { print "Enough as they are:" }
        $2 == $3 { printf "  %-32s %s\n", $1, $2 }'
    [ "$WANTS" = original_settings ] ||
        echo 'Left alone: tcp_rmem and tcp_wmem (tiny ones save nothing), the stack limit.'
    cat <<TEXT
A service takes its limit from its unit: LimitNOFILE=$(nofile_wanted)
Nothing is changed. As root, --apply does it and --revert takes it back.
TEXT
}

show_file() {
    says_something "$2" || return 0
    printf '%s\n' "--- ${1#"$TUNE_ROOT"}" "$2" ''
}

apply() {
    local settings
    settings=$(plan)
    if ! remember "$settings" "$(plan_nofile)"; then
        fail 'the values from before can not be kept, so nothing is changed'
        return
    fi
    if write_file "$SYSCTLS" "$(sysctl_text)" && write_file "$MODULES" "$(modules_text)"; then
        while IFS='|' read -r key before value why; do
            set_value "$key" "$value"
        done <<TEXT
$settings
TEXT
        apply_limits
    else
        fail 'without its drop-in a setting would be gone at the next start, so the kernel is left as it is'
    fi
    forget
    [ "$FAILED" -eq 0 ] || return 0
    echo "applied for $CONNECTIONS connections; a new descriptor limit counts from the next login on"
}

# A descriptor limit above fs.nr_open locks everyone out: the login can't set it and ends.
apply_limits() {
    local wanted
    wanted=$(plan_nofile | changes | cut -d '|' -f 3)
    if [ -n "$wanted" ] && [ "$(first_of fs.nr_open)" -lt "$wanted" ]; then
        fail "fs.nr_open is below $wanted, so ${LIMITS#"$TUNE_ROOT"} is not written"
        return
    fi
    write_file "$LIMITS" "$(limits_text)"
}

revert() {
    local key before other
    if [ ! -f "$STATE" ]; then
        revert_without_state
        return
    fi
    while read -r key before; do
        other=$(other_of "$key")
        [ "$key" = limit.nofile ] || set_value "$key" "${other:-$before}"
    done <"$STATE"
    remove_files
    forget
    [ "$FAILED" -ne 0 ] || echo 'reverted'
}

# Nothing is applied, unless someone has removed the state.
revert_without_state() {
    if [ ! -f "$SYSCTLS" ] && [ ! -f "$LIMITS" ] && [ ! -f "$MODULES" ]; then
        echo 'nothing is applied'
        return
    fi
    remove_files
    fail "$STATE is gone: the drop-ins are removed, and the kernel's values stay until its next start"
}

remove_files() {
    local file
    for file in "$SYSCTLS" "$LIMITS" "$MODULES"; do
        remove_file "$file"
    done
}

remove_file() {
    rm -f "$1" 2>/dev/null || { fail "can't remove $1" && return 1; }
}

set_value() {
    local file
    file=$(file_of "$1")
    [ "$(value_of "$1")" = "$2" ] && return
    if ! { echo "$2" >"$file"; } 2>/dev/null || [ "$(value_of "$1")" != "$2" ]; then
        fail "$1 stays at $(value_of "$1"), the kernel refuses $2"
    fi
}

# Keeps what is there now, where nothing is kept yet and it is going to change.
remember() {
    local key before value why kept
    kept=$(
        cat "$STATE" 2>/dev/null
        printf '%s\n' "$@" | changes | while IFS='|' read -r key before value why; do
            [ -n "$(before_of "$key")" ] || echo "$key $before"
        done
    )
    write_file "$STATE" "$kept"
}

# Drops what is as it was and no drop-in sets any more, and at the end the state itself.
forget() {
    local key before
    [ -f "$STATE" ] || return 0
    write_file "$STATE" "$(while read -r key before; do
        { is_held "$key" || ! is_restored "$key" "$before"; } && echo "$key $before"
    done <"$STATE")"
    [ -f "$STATE" ] || rmdir "${STATE%/*}" 2>/dev/null || true
}

is_held() {
    if [ "$1" = limit.nofile ]; then
        [ -f "$LIMITS" ] || [ -n "$(other_nofile)" ]
    else
        [ -n "$(setting_in "$SYSCTLS" "$1")" ] || [ -n "$(other_of "$1")" ]
    fi
}

# The limit of a login is nowhere but in its drop-in.
is_restored() {
    [ "$1" = limit.nofile ] || [ "$(value_of "$1")" = "$2" ]
}

# write_file FILE TEXT: all of it and on disk, or nothing; a text that says nothing removes the file.
write_file() {
    if ! says_something "$2"; then
        remove_file "$1"
        return
    fi
    { mkdir -p "${1%/*}" && printf '%s\n' "$2" >"$1.new" && { sync "$1.new" || sync; } && mv "$1.new" "$1"; } 2>/dev/null &&
        return
    rm -f "$1.new" 2>/dev/null
    fail "can't write $1"
    return 1
}
