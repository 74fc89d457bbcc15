//! A borrowed or temporary descriptor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The descriptor of a connection's socket, from [`Context::connection_fd`](crate::Context::connection_fd). For a
/// registered file it is a temporary descriptor, which is closed when this value is dropped.
#[derive(Debug)]
pub struct LentFd<'a>(Lent<'a>);

#[derive(Debug)]
enum Lent<'a> {
    Borrowed(BorrowedFd<'a>),
    Installed(OwnedFd),
}

impl<'a> LentFd<'a> {
    pub(super) fn borrowed(descriptor: BorrowedFd<'a>) -> Self {
        Self(Lent::Borrowed(descriptor))
    }

    pub(super) fn installed(descriptor: OwnedFd) -> Self {
        Self(Lent::Installed(descriptor))
    }
}

impl AsFd for LentFd<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Lent::Borrowed(descriptor) => *descriptor,
            Lent::Installed(descriptor) => descriptor.as_fd(),
        }
    }
}
