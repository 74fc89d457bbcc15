# shellcheck shell=bash
# Words to the person who waits. SCRIPT is who says them.

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
