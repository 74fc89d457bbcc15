//! Virtual machines with a kernel of their own: the host gives orders, and process 1 of each guest follows them.

pub(crate) mod guests;
pub(crate) mod init;
pub(crate) mod initramfs;
pub(crate) mod million;
pub(crate) mod order;
pub(crate) mod packages;
pub(crate) mod qemu;

/// The card of one end of a cable: two qemu processes number theirs alike.
pub(crate) fn card(cable: u8, end: u8) -> String {
    format!("52:54:00:c1:{cable:02x}:{end:02x}")
}
