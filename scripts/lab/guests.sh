# shellcheck shell=bash
# The run in virtual machines.

guests_run() {
    fail "a virtual machine can't be had yet; use --native"
}

guests_clean() {
    :
}
