//! Shared by the examples: their arguments, and errors as one line on standard error.

use std::fmt;
use std::net::SocketAddr;
use std::process;

/// Parses an address; ends the program if it is invalid.
pub(crate) fn address(argument: &str) -> SocketAddr {
    argument.parse().unwrap_or_else(|_| {
        usage_error(&format!(
            "{argument:?} is not an address; expected IP:PORT, for example 127.0.0.1:7007"
        ))
    })
}

/// Ends a program that was called with invalid arguments.
pub(crate) fn usage_error(why: &str) -> ! {
    eprintln!("Error: {why}");
    process::exit(2)
}

/// An error for `main` to return. It is printed with `Display`, where other errors are printed with `Debug`.
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
