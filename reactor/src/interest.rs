//! What a watched descriptor is watched for.

use crate::sys::Readiness;

/// What a descriptor is watched for; see [`Context::watch`](crate::Context::watch).
///
/// Errors and hang-ups are reported with each of them but [`Nothing`](Self::Nothing).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Nothing at all for now, not even errors.
    Nothing,
    /// That a read will not block.
    Readable,
    /// That a write will not block.
    Writable,
    /// Either.
    Both,
}

impl Interest {
    /// What epoll is to watch for; `None` where it is to know nothing of the descriptor: an empty interest would
    /// still report errors and hang-ups, without end.
    pub(crate) fn registered(self) -> Option<Readiness> {
        match self {
            Interest::Nothing => None,
            Interest::Readable => Some(Readiness::READABLE),
            Interest::Writable => Some(Readiness::WRITABLE),
            Interest::Both => Some(Readiness::READABLE.with(Readiness::WRITABLE)),
        }
    }
}
