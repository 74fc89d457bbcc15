//! Virtual machines with a kernel of their own.

pub(crate) mod init;
pub(crate) mod initramfs;
pub(crate) mod packages;
pub(crate) mod qemu;

/// The card of one end of a cable: two qemu processes number theirs alike.
fn card(cable: u8, end: u8) -> String {
    format!("52:54:00:c1:{cable:02x}:{end:02x}")
}
