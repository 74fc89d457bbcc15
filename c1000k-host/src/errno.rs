//! Names of the system's error numbers.

use nix::errno::Errno;

/// The name of an error number in `errno.h`: `ECONNREFUSED`.
///
/// ```
/// assert_eq!(c1000k_host::errno_name(24), "EMFILE");
/// assert_eq!(c1000k_host::errno_name(99_999), "E99999");
/// ```
#[must_use]
pub fn errno_name(number: i32) -> String {
    match Errno::from_raw(number) {
        Errno::UnknownErrno => format!("E{number}"),
        errno => format!("{errno:?}"),
    }
}
