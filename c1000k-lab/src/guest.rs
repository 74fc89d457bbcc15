//! Virtual machines with a kernel of their own: the host sends requests, and process 1 of each guest handles them.

pub(crate) mod guests;
pub(crate) mod init;
pub(crate) mod initramfs;
pub(crate) mod million;
pub(crate) mod packages;
pub(crate) mod qemu;
pub(crate) mod request;

/// The MAC address of one end of a cable. By default all qemu processes assign the same ones.
pub(crate) fn card(cable: u8, end: u8) -> String {
    format!("52:54:00:c1:{cable:02x}:{end:02x}")
}
