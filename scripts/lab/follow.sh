# shellcheck shell=bash
# Several growing logs, read line by line as they are written.

declare -A follow_fd follow_part

# follow NAME FILE; the file may come into being later, by whoever writes it.
follow() {
    local fd
    [[ -e $2 ]] || : >"$2"
    exec {fd}<"$2"
    follow_fd[$1]=$fd
    follow_part[$1]=''
}

# next_line NAME: the next whole line goes to LINE; fails if there is none yet.
next_line() {
    local part
    if IFS= read -r part <&"${follow_fd[$1]}"; then
        # shellcheck disable=SC2034 # the caller's
        LINE=${follow_part[$1]}${part%$'\r'}
        follow_part[$1]=''
        return 0
    fi
    follow_part[$1]+=$part
    return 1
}

# Between two looks at the logs. Ctrl-C may end the sleep; the trap for it has then run.
pause() {
    sleep 0.2 || true
}
