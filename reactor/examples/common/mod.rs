//! What the examples share: their arguments, and one line on standard error where something does not work.

use std::fmt;
use std::net::SocketAddr;
use std::process;
use std::time::Duration;

/// The address that an argument names; one that names none ends the program.
pub(crate) fn address(argument: &str) -> SocketAddr {
    argument.parse().unwrap_or_else(|_| {
        misused(&format!("{argument:?} is no address; give IP:PORT, for example 127.0.0.1:7007"))
    })
}

/// The time that an argument names, in seconds.
#[allow(dead_code)] // Not every example takes one.
pub(crate) fn seconds(argument: &str) -> Duration {
    let seconds =
        argument.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.unwrap_or_else(|| misused(&format!("{argument:?} is no number of seconds")))
}

/// Ends a program that was called with the wrong arguments.
pub(crate) fn misused(why: &str) -> ! {
    eprintln!("Error: {why}");
    process::exit(2)
}

/// An error that `main` may return: it is printed as a sentence, where others are printed as Rust sees them.
pub(crate) struct Failure(String);

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
