# shellcheck shell=dash
# What tune-server and tune-client want, what is there, and what it comes to.
#
# A value is never lowered (but by --original): what is wanted is the highest of what was there
# before, what N needs and what the other script has applied.
# Uses WANTS, CONNECTIONS, TUNE_ROOT, STATE, SYSCTLS and LIMITS of tune.sh.

# shellcheck disable=SC2034 # for the two scripts
readonly RESERVED=32  # descriptors that a process keeps for itself; as in c1000k-host
readonly OTHERS=65536 # files, watches and connections that the rest of the machine may have

# want KEY VALUE WHY: at least VALUE, number by number; with "=" before it, exactly that.
want() {
    echo "$1|$2|$3"
}

# Both ends may be on this machine, and run under one user.
descriptor_settings() {
    local both=$((2 * CONNECTIONS + OTHERS))
    want fs.nr_open "$1" "the highest descriptor limit that a process may be given"
    want fs.file-max "$both" "open files of the whole system"
    want fs.epoll.max_user_watches "$both" "descriptors that a user's processes may watch"
}

# Room for a page of queued data each, as long as that is not more than half of the memory.
tcp_mem_settings() {
    local half
    half=$(awk '/^MemTotal:/ { print int($2 / 8) }' "$TUNE_ROOT/proc/meminfo")
    want net.ipv4.tcp_mem "$(least $((CONNECTIONS / 2)) $((half / 3))) $(
        least "$CONNECTIONS" $((half * 2 / 3))
    ) $(least $((CONNECTIONS * 3 / 2)) "$half")" "pages, not bytes, for queued data"
}

conntrack_settings() {
    conntrack_in_use || return 0
    want net.netfilter.nf_conntrack_max $((CONNECTIONS + OTHERS)) \
        "connections that the firewall tracks"
}

# That the module is loaded says little: it is in use when it tracks something, or when another
# module, a firewall's, holds it.
conntrack_in_use() {
    [ -n "$(value_of net.netfilter.nf_conntrack_max)" ] || return 1
    [ "$(first_of net.netfilter.nf_conntrack_count)" -eq 0 ] || return 0
    awk '$1 == "nf_conntrack" && $3 > 0 { used = 1 } END { exit !used }' \
        "$TUNE_ROOT/proc/modules" 2>/dev/null
}

original_descriptor_settings() {
    want fs.nr_open 2000000 "the highest descriptor limit that a process may be given"
    want fs.file-max 2000000 "open files of the whole system"
    conntrack_in_use || return 0
    want net.netfilter.nf_conntrack_max 2000000 "connections that the firewall tracks"
}

nofile_wanted() {
    if [ "$WANTS" = original_settings ]; then echo 2000000; else descriptors_needed; fi
}

least() {
    if [ "$1" -le "$2" ]; then echo "$1"; else echo "$2"; fi
}

file_of() {
    echo "$TUNE_ROOT/proc/sys/$(echo "$1" | tr . /)"
}

# The value now, its numbers one space apart; nothing where this kernel has no such setting.
value_of() {
    tr -s '\t' ' ' 2>/dev/null <"$(file_of "$1")" | sed 's/ *$//' || true
}

first_of() {
    local value
    value=$(value_of "$1")
    echo "${value%% *}"
}

# The value before any --apply.
before_of() {
    awk -v key="$1" '$1 == key { sub(/^[^ ]* /, ""); print }' "$STATE" 2>/dev/null
}

# What the other script's drop-in sets.
other_of() {
    local file
    for file in "$TUNE_ROOT"/etc/sysctl.d/90-c1000k-*.conf; do
        [ "$file" = "$SYSCTLS" ] || [ ! -f "$file" ] || setting_in "$file" "$1"
    done
}

setting_in() {
    awk -F ' = ' -v key="$2" '$1 == key { print $2 }' "$1" 2>/dev/null
}

nofile_of() {
    awk '$1 == "root" && $3 == "nofile" { print $4 }' "$1" 2>/dev/null
}

other_nofile() {
    local file
    for file in "$TUNE_ROOT"/etc/security/limits.d/90-c1000k-*.conf; do
        [ "$file" = "$LIMITS" ] || [ ! -f "$file" ] || nofile_of "$file"
    done
}

# Each setting of this kernel as key|before|value|why, where value is what it should become.
plan() {
    local key needed why base
    "$WANTS" | while IFS='|' read -r key needed why; do
        base=$(before_of "$key")
        [ -n "$base" ] || base=$(value_of "$key")
        [ -n "$base" ] || continue
        echo "$key|$base|$(resolve "$key" "$base" "$needed" "$(other_of "$key")")|$why"
    done
}

# resolve KEY BASE NEEDED OTHER
resolve() {
    case $3 in
        =*) echo "${3#=}" && return ;;
    esac
    if [ "$1" = net.ipv4.ip_local_port_range ]; then
        widest "$(widest "$2" "$3")" "${4:-$2}"
    else
        highest "$(highest "$2" "$3")" "${4:-$2}"
    fi
}

# Number by number the higher one.
highest() {
    local values='' other=$2 first
    for first in $1; do
        if [ "${other%% *}" -gt "$first" ]; then first=${other%% *}; fi
        values="$values $first"
        other=${other#* }
    done
    echo "${values# }"
}

# The lower start and the higher end.
widest() {
    echo "$(least "${1% *}" "${2% *}") $(highest "${1#* }" "${2#* }")"
}

# The limit for a login's processes; as settings, key|before|value|why.
plan_nofile() {
    local base wanted
    base=$(before_of limit.nofile)
    [ -n "$base" ] || base=$(ulimit -Hn)
    [ "$base" != unlimited ] || return 0
    wanted=$(highest "$base" "$(nofile_wanted)")
    echo "limit.nofile|$base|$(highest "$wanted" "$(other_nofile | grep . || echo "$wanted")")|"
}

changes() {
    awk -F '|' '$2 != $3'
}
