#!/bin/bash
# The million by the C program and by the project's programs in turn, as nobody. Slab in kB before, and at its most.
mkdir -p out/c; cd out/c
as=(setpriv --reuid=65534 --regid=65534 --clear-groups)
slab() { awk '/^Slab:/ { print $2 }' /proc/meminfo; }
most() { local m=0 s; while kill -0 "$1" 2>/dev/null; do s=$(slab); ((s > m)) && m=$s; sleep 0.5; done; echo "$m" > most; }
run() { # NAME SERVER... -- CLIENT...
    local name=$1 server=() ; shift
    while [[ $1 != -- ]]; do server+=("$1"); shift; done; shift
    local before; before=$(slab)
    "${as[@]}" "${server[@]}" > server.txt 2>&1 & local s=$!
    sleep 2
    "${as[@]}" "$@" > client.txt 2>&1 & local c=$!
    most $c & local m=$!
    wait $c; local rc=$?
    wait $m
    kill -TERM $s; wait $s 2>/dev/null
    sleep 3
    local ramp; case $name in c) ramp=$(sed -n 's/ramp_seconds \([0-9.]*\).*/\1/p' client.txt);; *) ramp=$(sed -n 's/.*"ramp_seconds": \([0-9.]*\).*/\1/p' client.txt | head -1);; esac
    echo "$(date +%H:%M:%S) $name rc $rc ramp_seconds $ramp slab_kb_before $before slab_kb_most $(cat most)"
}
B=target/release
C=(run c ./registered serve 9900 100 -- ./registered flood 127.0.0.1 9900 100 1000000)
O=(run ours $B/c1000k-server -- $B/c1000k-client 127.0.0.1 -c 1M --json -)
for t in C O O C C O; do
    case $t in C) "${C[@]}";; O) "${O[@]}";; esac
done
