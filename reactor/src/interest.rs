//! What a watched descriptor is watched for.

use crate::sys::Readiness;

/// What a descriptor is watched for; see [`Context::watch`](crate::Context::watch).
///
/// Errors and hang-ups are always reported, except with [`Nothing`](Self::Nothing).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Nothing for now, not even errors.
    Nothing,
    /// Ready for reading.
    Readable,
    /// Ready for writing.
    Writable,
    /// Ready for reading or writing.
    Both,
}

impl Interest {
    /// The events to register with epoll; `None` if the descriptor must not be registered, because with an empty
    /// interest epoll would still report errors and hang-ups continuously.
    pub(crate) fn registered(self) -> Option<Readiness> {
        match self {
            Interest::Nothing => None,
            Interest::Readable => Some(Readiness::READABLE),
            Interest::Writable => Some(Readiness::WRITABLE),
            Interest::Both => Some(Readiness::READABLE.with(Readiness::WRITABLE)),
        }
    }
}
