# shellcheck shell=bash
# The two programs: built, or those that MILLION_BINARIES names.

# build_programs native|vm: sets BINARIES to their folder. In a guest they have to do without libraries.
# MILLION_BINARIES names a folder with another c1000k-server and c1000k-client to run instead: docs/lab.md measures the
# bare C floor that way.
build_programs() {
    if [[ -n ${MILLION_BINARIES:-} ]]; then
        BINARIES=$(cd "$MILLION_BINARIES" && pwd)
        return
    fi
    command -v cargo >/dev/null || fail "cargo is missing: install Rust from https://rustup.rs"
    say "building c1000k-server and c1000k-client in release mode"
    if [[ $1 == native ]]; then
        BINARIES=$TARGET/release
        cargo_build
    else
        BINARIES=$TARGET/x86_64-unknown-linux-gnu/release
        RUSTFLAGS='-C target-feature=+crt-static' cargo_build --target x86_64-unknown-linux-gnu
    fi
}

cargo_build() {
    (cd "$ROOT" && cargo build --quiet --release -p c1000k-server -p c1000k-client "$@") ||
        fail "the build failed; cargo's words are above"
}
