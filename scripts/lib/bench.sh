# shellcheck shell=bash
# Builds the benchmark, with the given options of cargo, and its C programs; sets `bench` and `programs`.
# Uses cargo.sh.

build_bench() {
    command -v cc >/dev/null || { echo "a C compiler is missing (on Debian: apt-get install gcc libc6-dev)" >&2; exit 1; }
    command -v taskset >/dev/null || { echo "taskset is missing (on Debian: apt-get install util-linux)" >&2; exit 1; }
    build_with_cargo --release --quiet -p c1000k-bench "$@"
    local program
    programs=$TARGET/bench
    # shellcheck disable=SC2034 # for the script that sources this
    bench=${PROGRAMS[c1000k-bench]}
    mkdir -p "$programs"
    for program in floor load uring registered; do
        cc -O2 -Wall -Wextra -o "$programs/$program" "$ROOT/bench/c/$program.c"
    done
}
