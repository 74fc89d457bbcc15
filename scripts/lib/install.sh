# shellcheck shell=bash
# Installs system packages that a script needs, if permitted, and never removes others.

# install_package PACKAGE WHY: as root with apt-get. First prints which packages are added. Fails with the reason if it is
# not permitted, if apt-get would have to remove something, and if the installation fails.
install_package() {
    local options=(--no-install-recommends --no-remove) plan output
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        echo "$1 is missing, $2: install it (Debian, Ubuntu: sudo apt-get install $1)" >&2
        return 1
    fi
    if ! plan=$(apt-get install --simulate "${options[@]}" "$1" 2>&1); then
        echo "$1 is missing, $2, and apt-get can't install it: $(tail -n 1 <<<"$plan"); if the package lists are old, run apt-get update" >&2
        return 1
    fi
    echo "installing $1, $2: apt-get adds$(awk '$1 == "Inst" { printf " %s", $2 }' <<<"$plan") and removes nothing" >&2
    if ! output=$(DEBIAN_FRONTEND=noninteractive apt-get install --yes "${options[@]}" "$1" 2>&1); then
        echo "$1 could not be installed: $(tail -n 1 <<<"$output")" >&2
        return 1
    fi
}
