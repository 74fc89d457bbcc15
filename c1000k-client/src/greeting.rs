//! The message that proves a connection alive: sent once, and to come back byte for byte.

use std::io::Write;

/// Prefix and the longest number.
const BYTES_MAX: usize = 40;

/// The message of one connection.
#[derive(Debug)]
pub(crate) struct Greeting {
    bytes: [u8; BYTES_MAX],
    len: usize,
}

/// How far an echo has come.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Echo {
    /// So many bytes have come back, all of them right.
    Partial(u8),
    /// All of it.
    Whole,
    /// Other bytes, or too many.
    Wrong,
}

impl Greeting {
    pub(crate) fn of(number: u32) -> Self {
        let mut bytes = [0; BYTES_MAX];
        let mut rest = &mut bytes[..];
        let fits = write!(rest, "Hello Server, connections num:{number}");
        debug_assert!(fits.is_ok());
        let len = BYTES_MAX - rest.len();
        Self { bytes, len }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Compares what came back after the first `matched` bytes.
    pub(crate) fn check(&self, matched: u8, bytes: &[u8]) -> Echo {
        let expected = &self.as_bytes()[usize::from(matched)..];
        if expected == bytes {
            Echo::Whole
        } else if expected.starts_with(bytes) {
            Echo::Partial(matched + bytes.len() as u8)
        } else {
            Echo::Wrong
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_is_that_of_the_original() {
        assert_eq!(Greeting::of(1).as_bytes(), b"Hello Server, connections num:1");
        assert_eq!(Greeting::of(u32::MAX).as_bytes().len(), BYTES_MAX);
    }

    #[test]
    fn an_echo_may_come_in_pieces() {
        let greeting = Greeting::of(77);
        let (head, tail) = greeting.as_bytes().split_at(10);
        assert_eq!(greeting.check(0, head), Echo::Partial(10));
        assert_eq!(greeting.check(10, tail), Echo::Whole);
        assert_eq!(greeting.check(0, greeting.as_bytes()), Echo::Whole);
    }

    #[test]
    fn other_bytes_and_more_bytes_are_wrong() {
        let greeting = Greeting::of(77);
        assert_eq!(greeting.check(0, b"Hello!"), Echo::Wrong);
        assert_eq!(greeting.check(10, greeting.as_bytes()), Echo::Wrong);
        assert_eq!(greeting.check(0, b"Hello Server, connections num:770"), Echo::Wrong);
    }
}
