//! Keys of connections, listeners, timers and watches.
//!
//! Each key is a slot index in the low 32 bits, a generation of 29 bits above it, and a kind in the top three bits.
//! The same 64 bits are the epoll user data of the descriptor, so the index of an event gives its slot, and the
//! generation shows whether the slot is still used by the object for which the event was registered. Each use of a slot
//! increments the generation; after 2^29 - 1 it starts again at 1.

use std::fmt;
use std::num::NonZeroU64;

/// Identifies a connection. It does not match a later connection in the same slot.
///
/// A token can be copied, stored, and sent to another thread. When its connection ends it becomes stale; each method of
/// [`Context`](crate::Context) documents what it does with a stale token.
///
/// A stale token matches a later connection only after the slot's generations have wrapped around, which takes
/// 536,870,911 connections in that slot: 15 hours at 10,000 per second, all in the same slot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(SlotKey);

/// Identifies a listener; returned by [`Context::listen`](crate::Context::listen).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenerId(SlotKey);

/// Identifies a timer; returned by [`Context::add_timer`](crate::Context::add_timer).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimerId(SlotKey);

/// Identifies a watched descriptor; returned by [`Context::watch`](crate::Context::watch).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WatchId(SlotKey);

impl Token {
    /// Returns the slot's index: small, dense, and reused after the connection has ended.
    #[must_use]
    pub fn index(self) -> usize {
        self.0.index() as usize
    }

    /// Returns the token as 64 bits, for example to pass it through another system.
    #[must_use]
    pub fn to_bits(self) -> u64 {
        self.0.to_bits(Kind::Connection)
    }

    /// Returns the token for the result of [`to_bits`](Self::to_bits); `None` if the bits are not those of a token.
    #[must_use]
    #[inline]
    pub fn from_bits(bits: u64) -> Option<Self> {
        if bits >> KIND_SHIFT != Kind::Connection as u64 {
            return None;
        }
        SlotKey::from_bits(bits).map(Self)
    }
}

/// The key of a slot in a [`Slab`](crate::slab::Slab): an index and a generation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SlotKey(NonZeroU64);

/// The position of the kind's lowest bit.
const KIND_SHIFT: u32 = 61;

/// Generations run from 1 to this and then start again at 1.
pub(crate) const GENERATION_MAX: u32 = (1 << (KIND_SHIFT - 32)) - 1;

impl SlotKey {
    /// # Panics
    /// If the generation is not within 1 to [`GENERATION_MAX`]; the slab uses no other.
    #[inline]
    pub(crate) fn new(index: u32, generation: u32) -> Self {
        assert!((1..=GENERATION_MAX).contains(&generation), "a generation is out of range");
        let bits = u64::from(generation) << 32 | u64::from(index);
        Self(NonZeroU64::new(bits).expect("a generation is never zero"))
    }

    /// The key in 64 bits of any kind; `None` if the generation is zero.
    fn from_bits(bits: u64) -> Option<Self> {
        let bits = bits & ((1 << KIND_SHIFT) - 1);
        if bits >> 32 == 0 { None } else { NonZeroU64::new(bits).map(Self) }
    }

    pub(crate) fn index(self) -> u32 {
        (self.0.get() & u64::from(u32::MAX)) as u32
    }

    pub(crate) fn generation(self) -> u32 {
        (self.0.get() >> 32) as u32
    }

    fn to_bits(self, kind: Kind) -> u64 {
        self.0.get() | (kind as u64) << KIND_SHIFT
    }
}

impl fmt::Debug for SlotKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}v{}", self.index(), self.generation())
    }
}

macro_rules! named {
    ($type:ident) => {
        impl From<SlotKey> for $type {
            fn from(key: SlotKey) -> Self {
                Self(key)
            }
        }

        impl $type {
            pub(crate) fn key(self) -> SlotKey {
                self.0
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($type), "({:?})"), self.0)
            }
        }
    };
}

named!(Token);
named!(ListenerId);
named!(TimerId);
named!(WatchId);

#[derive(Clone, Copy)]
enum Kind {
    Connection = 0,
    Listener = 1,
    Timer = 2,
    Inner = 3,
    Watch = 4,
}

/// The source of an epoll event or a timer, which is encoded in 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventSource {
    Connection(Token),
    Listener(ListenerId),
    Timer(TimerId),
    Watch(WatchId),
    Inner(Inner),
}

/// The reactor's own descriptors and timers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inner {
    Wake = 1,
    Signal = 2,
    Grace = 3,
    Pause = 4,
    Retry = 5,
    Linger = 6,
}

impl EventSource {
    pub(crate) fn to_bits(self) -> u64 {
        match self {
            EventSource::Connection(token) => token.0.to_bits(Kind::Connection),
            EventSource::Listener(listener) => listener.0.to_bits(Kind::Listener),
            EventSource::Timer(timer) => timer.0.to_bits(Kind::Timer),
            EventSource::Watch(watch) => watch.0.to_bits(Kind::Watch),
            EventSource::Inner(inner) => SlotKey::new(inner as u32, 1).to_bits(Kind::Inner),
        }
    }

    pub(crate) fn from_bits(bits: u64) -> Option<Self> {
        let key = SlotKey::from_bits(bits)?;
        Some(match bits >> KIND_SHIFT {
            0 => EventSource::Connection(Token(key)),
            1 => EventSource::Listener(ListenerId(key)),
            2 => EventSource::Timer(TimerId(key)),
            3 => EventSource::Inner(match key.index() {
                1 => Inner::Wake,
                2 => Inner::Signal,
                3 => Inner::Grace,
                4 => Inner::Pause,
                5 => Inner::Retry,
                6 => Inner::Linger,
                _ => return None,
            }),
            4 => EventSource::Watch(WatchId(key)),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_round_trips_through_64_bits() {
        let key = SlotKey::new(u32::MAX - 1, GENERATION_MAX);
        for source in [
            EventSource::Connection(key.into()),
            EventSource::Listener(key.into()),
            EventSource::Timer(key.into()),
            EventSource::Watch(key.into()),
            EventSource::Inner(Inner::Wake),
            EventSource::Inner(Inner::Signal),
            EventSource::Inner(Inner::Grace),
            EventSource::Inner(Inner::Pause),
            EventSource::Inner(Inner::Retry),
        ] {
            assert_eq!(EventSource::from_bits(source.to_bits()), Some(source));
        }
    }

    #[test]
    fn bits_without_a_generation_or_with_another_kind_are_rejected() {
        assert_eq!(EventSource::from_bits(7), None);
        assert_eq!(Token::from_bits(7), None);
        assert_eq!(Token::from_bits(1 << KIND_SHIFT | 1 << 32), None);
        assert_eq!(EventSource::from_bits(7 << KIND_SHIFT | 1 << 32), None);
    }
}
