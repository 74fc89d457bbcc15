# shellcheck shell=bash
# What the virtual machine is made of: a kernel, busybox, and qemu where the machine has none. They are unpacked into
# cargo's target folder and not installed, so that nothing of the machine's own changes, and anyone may do it.
# Uses say.sh; sets KERNEL_VERSION.

readonly PACKAGES=$TARGET/lab # kernel, busybox and qemu, unpacked

packages_fetch() {
    [[ $(uname -m) == x86_64 ]] || fail "the virtual machine is built for x86_64 only, and this is $(uname -m): use --native"
    packages_need_qemu
    [[ -x $PACKAGES/bin/busybox ]] || packages_unpack busybox-static
    packages_kernel_version
    if [[ -z $KERNEL_VERSION ]]; then
        packages_unpack "$(packages_kernel_name)"
        packages_kernel_version
    fi
}

packages_need_qemu() {
    command -v qemu-system-x86_64 >/dev/null && return
    [[ -x $PACKAGES/qemu/qemu-system-x86_64 ]] || packages_unpack_qemu
    PATH=$PACKAGES/qemu:$PATH
}

# With all the packages that it needs and that are not installed here, its libraries among them.
packages_unpack_qemu() {
    packages_need_apt
    local names folder package
    names=$(apt-get install --simulate --no-install-recommends qemu-system-x86 2>/dev/null | awk '$1 == "Inst" { print $2 }')
    [[ -n $names ]] || fail "apt knows no qemu-system-x86: run apt-get update, or install qemu by hand"
    say "fetching qemu-system-x86, which boots the virtual machine, and the $(($(wc -l <<<"$names") - 1)) packages that it needs into $PACKAGES, where they are unpacked and not installed"
    mkdir -p "$PACKAGES"
    folder=$(mktemp -d "$PACKAGES/download.XXXXXX")
    # shellcheck disable=SC2086 # several names
    (cd "$folder" && packages_quietly apt-get download $names)
    for package in "$folder"/*.deb; do
        packages_quietly dpkg-deb --extract "$package" "$folder/qemu"
    done
    cat >"$folder/qemu/qemu-system-x86_64" <<'TEXT'
#!/bin/sh
here=$(dirname "$0")
LD_LIBRARY_PATH=$here/usr/lib/x86_64-linux-gnu:$here/lib/x86_64-linux-gnu exec "$here/usr/bin/qemu-system-x86_64" "$@"
TEXT
    chmod +x "$folder/qemu/qemu-system-x86_64"
    packages_quietly mv "$folder/qemu" "$PACKAGES/"
    rm -rf "$folder"
}

packages_kernel_version() {
    KERNEL_VERSION=$({ find "$PACKAGES/lib/modules" -mindepth 1 -maxdepth 1 -printf '%f\n' 2>/dev/null || true; } | sort -V | tail -n 1)
}

# The package that Debian's cloud kernel of today is.
packages_kernel_name() {
    packages_need_apt
    local name
    name=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '$1 == "Depends:" { print $2; exit }')
    [[ -n $name ]] || fail "apt knows no linux-image-cloud-amd64: run apt-get update; elsewhere than on Debian, unpack that package into $PACKAGES"
    echo "$name"
}

packages_need_apt() {
    { command -v apt-get && command -v dpkg-deb; } >/dev/null ||
        fail "apt-get and dpkg-deb are missing: unpack Debian's linux-image-cloud-amd64 and busybox-static into $PACKAGES by hand"
}

# Unpacked elsewhere and then moved: a run that is ended in between leaves nothing half there that a
# later one would take for whole. What is looked for moves last.
packages_unpack() {
    packages_need_apt
    local folder part
    say "fetching $1 into $PACKAGES"
    mkdir -p "$PACKAGES"
    folder=$(mktemp -d "$PACKAGES/download.XXXXXX")
    (cd "$folder" && packages_quietly apt-get download "$1")
    packages_quietly dpkg-deb --extract "$folder/$1"_*.deb "$folder/tree"
    for part in boot bin lib/modules; do
        [[ -d $folder/tree/$part ]] || continue
        mkdir -p "$PACKAGES/$part"
        packages_quietly mv "$folder/tree/$part"/* "$PACKAGES/$part/"
    done
    rm -rf "$folder"
}

packages_quietly() {
    local words
    words=$("$@" 2>&1) || fail "'$*' failed: $(tail -n 1 <<<"$words"); if its package lists are old: apt-get update"
}
