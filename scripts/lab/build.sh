# shellcheck shell=bash
# The two programs: built, or those that MILLION_BINARIES names. Uses say.sh and ../lib/cargo.sh.

# build_programs native|vm: sets BINARIES to their folder. In a guest they have to do without libraries.
# MILLION_BINARIES names a folder with another c1000k-server and c1000k-client to run instead, and another c1000k-report
# if there is one: docs/lab.md measures the bare C floor that way.
build_programs() {
    if [[ -n ${MILLION_BINARIES:-} ]]; then
        BINARIES=$(cd "$MILLION_BINARIES" 2>/dev/null && pwd) || fail "MILLION_BINARIES names no folder: $MILLION_BINARIES"
        [[ ! -x $BINARIES/c1000k-report ]] || PROGRAMS[c1000k-report]=$BINARIES/c1000k-report
    else
        build_release "$1"
        BINARIES=$(dirname "${PROGRAMS[c1000k-server]}")
    fi
    local program
    for program in c1000k-server c1000k-client; do
        [[ -x $BINARIES/$program ]] || fail "there is no program $BINARIES/$program"
    done
}

build_release() {
    local options=(--release -p c1000k-server -p c1000k-client)
    command -v cargo >/dev/null || fail "cargo is missing: install Rust from https://rustup.rs"
    say "building c1000k-server and c1000k-client in release mode, which takes minutes the first time"
    if [[ $1 == native ]]; then
        build_with_cargo "${options[@]}" -p c1000k-report
    else
        RUSTFLAGS='-C target-feature=+crt-static' build_with_cargo --target x86_64-unknown-linux-gnu "${options[@]}"
    fi || fail "the build failed; cargo's words are above"
}

# What writes the page about the run, if that is not built yet; without cargo there is none.
build_report() {
    [[ -z ${PROGRAMS[c1000k-report]:-} ]] || return 0
    command -v cargo >/dev/null || return 0
    say "building c1000k-report"
    build_with_cargo --release -p c1000k-report || fail "the build failed; cargo's words are above"
}
