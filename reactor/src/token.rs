//! Names for what a reactor holds: connections, listeners, timers and watches.
//!
//! Each name is a slot index in the low 32 bits, a generation of 29 bits above it, and a kind in the top three bits.
//! The same 64 bits are the epoll user data of the descriptor, so an event leads to its slot by an index, and the
//! generation says whether that slot still belongs to the one that the event is about. Each use of a slot raises the
//! generation by one, and after 2^29 - 1 it starts again.

use std::fmt;
use std::num::NonZeroU64;

/// A connection's name: it does not match a later connection that happens to reuse the same slot.
///
/// Copy it freely, keep it, send it to another thread: at worst it has become stale, and each method of
/// [`Context`](crate::Context) says what it does with a stale token.
///
/// It can't be mistaken for a later one until the generations have run out and begin again, which takes at least
/// 536,870,911 connections: 15 hours, at 10,000 a second that all take the same slot in turn.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(SlotKey);

/// A listener's name, from [`Context::listen`](crate::Context::listen).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenerId(SlotKey);

/// The name of a free timer, from [`Context::add_timer`](crate::Context::add_timer).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimerId(SlotKey);

/// The name of a watched descriptor, from [`Context::watch`](crate::Context::watch).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WatchId(SlotKey);

impl Token {
    /// The slot's index: small, dense, and reused after the connection is gone.
    #[must_use]
    pub fn index(self) -> usize {
        self.0.index() as usize
    }

    /// The token as 64 bits, for example to send it through another system.
    #[must_use]
    pub fn to_bits(self) -> u64 {
        self.0.to_bits(Kind::Connection)
    }

    /// The token that [`to_bits`](Self::to_bits) gave; `None` for bits that are no connection's name.
    #[must_use]
    #[inline]
    pub fn from_bits(bits: u64) -> Option<Self> {
        if bits >> KIND_SHIFT != Kind::Connection as u64 {
            return None;
        }
        SlotKey::from_bits(bits).map(Self)
    }
}

/// An index and a generation: what a [`Slab`](crate::slab::Slab) hands out.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SlotKey(NonZeroU64);

/// Where the kind begins.
const KIND_SHIFT: u32 = 61;

/// Generations run from 1 to this and then start again at 1.
pub(crate) const GENERATION_MAX: u32 = (1 << (KIND_SHIFT - 32)) - 1;

impl SlotKey {
    /// # Panics
    /// If the generation is not within 1 to [`GENERATION_MAX`]: the slab hands out no other.
    #[inline]
    pub(crate) fn new(index: u32, generation: u32) -> Self {
        assert!((1..=GENERATION_MAX).contains(&generation), "a generation is out of range");
        let bits = u64::from(generation) << 32 | u64::from(index);
        Self(NonZeroU64::new(bits).expect("a generation is never zero"))
    }

    /// The key within 64 bits of any kind; `None` where there is no generation.
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

/// What an epoll event or a timer is about, as it travels in 64 bits.
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
    fn every_source_survives_its_64_bits() {
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
    fn bits_without_a_generation_name_nothing() {
        assert_eq!(EventSource::from_bits(7), None);
        assert_eq!(Token::from_bits(7), None);
        assert_eq!(Token::from_bits(1 << KIND_SHIFT | 1 << 32), None);
        assert_eq!(EventSource::from_bits(7 << KIND_SHIFT | 1 << 32), None);
    }
}
