# shellcheck shell=bash
# Words to the person who waits, and numbers as people write them. SCRIPT is who says them.

say() {
    printf '%s\n' "$*"
}

# The system or the run refused: one line, exit 1.
fail() {
    printf '%s: %s\n' "$SCRIPT" "$*" >&2
    exit 1
}

# The command line is wrong: one line, exit 2.
misuse() {
    printf '%s: %s; see %s --help\n' "$SCRIPT" "$*" "$SCRIPT" >&2
    exit 2
}

# 1234567 -> 1,234,567
grouped() {
    sed -e ':again' -e 's/\([0-9]\)\([0-9]\{3\}\)\($\|,\)/\1,\2\3/' -e 't again' <<<"$1"
}

# 10k -> 10000, 1M -> 1000000; fails on anything else.
count_of() {
    [[ $1 =~ ^([0-9]{1,9})([kKmM]?)$ ]] || return 1
    local number=$((10#${BASH_REMATCH[1]}))
    case ${BASH_REMATCH[2]} in
        k | K) number=$((number * 1000)) ;;
        m | M) number=$((number * 1000000)) ;;
    esac
    echo "$number"
}

# 512M -> 512, 14G -> 14336; fails on anything else, and on nothing at all.
mebibytes_of() {
    [[ $1 =~ ^([0-9]{1,6})([mMgG])$ ]] || return 1
    local number=$((10#${BASH_REMATCH[1]}))
    [[ ${BASH_REMATCH[2]} == [gG] ]] && number=$((number * 1024))
    ((number > 0)) && echo "$number"
}
