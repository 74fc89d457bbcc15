# shellcheck shell=bash
# What a guest boots into: guest-init, busybox, the kernel's modules and the two static binaries.
# Uses say.sh, packages.sh.

# In the order in which they depend on each other.
readonly MODULES=(
    net/core/failover
    drivers/net/net_failover
    drivers/virtio/virtio_ring
    drivers/virtio/virtio
    drivers/virtio/virtio_pci_legacy_dev
    drivers/virtio/virtio_pci_modern_dev
    drivers/virtio/virtio_pci
    drivers/block/virtio_blk
    drivers/net/virtio_net
)

# initramfs_build FILE
initramfs_build() {
    local tree=$1.tree busybox=$PACKAGES/bin/busybox
    mkdir -p "$tree/bin" "$tree/lib"
    cp "$busybox" "$BINARIES/c1000k-server" "$BINARIES/c1000k-client" "$tree/bin/"
    cp "$LAB/guest-init" "$tree/init"
    cp "$LAB/snapshot.sh" "$tree/"
    initramfs_modules "$tree"
    (cd "$tree" && "$busybox" find . | "$busybox" cpio -o -H newc 2>/dev/null | gzip -1) >"$1"
    rm -rf "$tree"
}

initramfs_modules() {
    local module file
    for module in "${MODULES[@]}"; do
        file=$PACKAGES/lib/modules/$KERNEL_VERSION/kernel/$module.ko
        [[ -f $file ]] || continue # built in, then
        cp "$file" "$1/lib/"
        echo "/lib/${module##*/}.ko"
    done >"$1/modules"
}
