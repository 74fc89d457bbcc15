# shellcheck shell=bash
# Builds with cargo and finds the built programs, for any setting of CARGO_TARGET_DIR, CARGO_BUILD_TARGET and
# cargo's configuration. Source it before any `cd`: a relative folder is relative to the working directory of the caller, as for cargo.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
for folder in CARGO_TARGET_DIR CARGO_BUILD_TARGET_DIR; do
    [[ -z ${!folder:-} || ${!folder} == /* ]] || export "$folder=$PWD/${!folder}"
done
unset folder
# For files that the scripts keep between runs.
# shellcheck disable=SC2034 # for the script that sources this
readonly ROOT TARGET=${CARGO_TARGET_DIR:-${CARGO_BUILD_TARGET_DIR:-$ROOT/target}}

declare -A PROGRAMS=() # name -> path of each program that was built

# build_with_cargo OPTIONS...: builds and sets PROGRAMS; cargo prints its progress and errors.
build_with_cargo() {
    local paths path
    paths=$(cd "$ROOT" && cargo build --locked --message-format json-render-diagnostics "$@" |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p') || return
    while IFS= read -r path; do
        [[ -z $path ]] || PROGRAMS[${path##*/}]=$path
    done <<<"$paths"
}
