# shellcheck shell=bash
# Builds the benchmark, with more options of cargo if any are given, and its C programs; sets `bench` and `programs`.

build_bench() {
    command -v cc >/dev/null || { echo "a C compiler is missing (on Debian: apt-get install gcc libc6-dev)" >&2; exit 1; }
    command -v taskset >/dev/null || { echo "taskset is missing (on Debian: apt-get install util-linux)" >&2; exit 1; }
    cargo build --release --quiet --locked -p c1000k-bench "$@"
    local target=${CARGO_TARGET_DIR:-target} program
    programs=$target/bench
    # shellcheck disable=SC2034 # for who sources this
    bench=$target/release/c1000k-bench
    mkdir -p "$programs"
    for program in floor load uring registered; do
        cc -O2 -Wall -Wextra -o "$programs/$program" "bench/c/$program.c"
    done
}
