# shellcheck shell=bash
# One virtual machine as a process: started, given orders, ended.
# Uses say.sh, packages.sh; everything it makes lies in the folder $MACHINE.

readonly PROBE_SECONDS=10

declare -A qemu_of=() # guest name -> pid

# KVM, if it really boots this kernel: a /dev/kvm that opens does not say so.
qemu_choose_accel() {
    ACCEL=tcg
    [[ -w /dev/kvm ]] || return 0
    say "trying whether KVM boots the guest's kernel"
    ACCEL=kvm
    qemu_boot probe 512 1 "$MACHINE/probe.log" "lab_role=probe lab_connections=1000"
    local deadline=$((SECONDS + PROBE_SECONDS))
    while qemu_running probe && ((SECONDS < deadline)); do
        pause
    done
    qemu_kill probe
    grep -q '^lab-event: booted' "$MACHINE/probe.log" 2>/dev/null && return
    ACCEL=tcg
    say "it does not: emulating, which is slower"
}

# qemu_boot NAME MEMORY_MB CPUS CONSOLE PARAMETERS [QEMU OPTIONS...]
qemu_boot() {
    local name=$1 memory=$2 cpus=$3 console=$4 parameters=$5
    shift 5
    truncate --size 256M "$MACHINE/disk-$name"
    mkfifo "$MACHINE/orders-$name.in" "$MACHINE/orders-$name.out"
    # From inside the folder, for the path of a unix socket is short at the most.
    (
        cd "$MACHINE" || exit
        # shellcheck disable=SC2046 # two words each
        exec setsid $(qemu_roomy_cables) qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none \
            $(qemu_accel) -smp "$cpus" -m "${memory}M" \
            -kernel "$PACKAGES/boot/vmlinuz-$KERNEL_VERSION" -initrd initramfs \
            -append "console=ttyS0 panic=-1 mitigations=off slab_nomerge no_timer_check quiet $parameters" \
            -serial "file:$console" \
            -chardev "pipe,id=orders,path=orders-$name" -serial chardev:orders \
            -drive "file=disk-$name,format=raw,if=none,id=disk" -device virtio-blk-pci,drive=disk \
            "$@"
    ) >"$MACHINE/qemu-$name.log" 2>&1 &
    qemu_of[$name]=$!
    disown # its end is read off its console and not off the shell's job messages
}

# A unix socket holds 10 datagrams by default, and qemu spins on a full one. The figure belongs to
# the network namespace: root gives qemu one of its own, and the host's stays as it is.
qemu_roomy_cables() {
    ((EUID == 0)) && command -v unshare >/dev/null || return 0
    echo unshare --net -- "$LAB/roomy-cables"
}

qemu_accel() {
    if [[ $ACCEL == kvm ]]; then
        echo -accel kvm -cpu host
    else
        echo -accel tcg,thread=multi -cpu max
    fi
}

# qemu_order NAME LINE; opened for both ways, so that it can't block on a guest that is gone.
qemu_order() {
    printf '%s\n' "$2" 1<>"$MACHINE/orders-$1.in"
}

qemu_running() {
    [[ -n ${qemu_of[$1]:-} ]] && kill -0 "${qemu_of[$1]}" 2>/dev/null
}

qemu_kill() {
    [[ -n ${qemu_of[$1]:-} ]] || return 0
    kill -KILL "${qemu_of[$1]}" 2>/dev/null || true
    unset "qemu_of[$1]"
}

qemu_kill_all() {
    local name
    for name in "${!qemu_of[@]}"; do
        qemu_kill "$name"
    done
}
