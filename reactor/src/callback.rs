//! The names of the callbacks, and a wrapper that times the callbacks of a handler.

use std::fmt;
use std::time::Duration;

use crate::context::{Context, SweepId};
use crate::error::{CloseReason, Error};
use crate::handler::{Handler, Incoming};
use crate::signal::Signal;
use crate::sys::Readiness;
use crate::token::{ListenerId, TimerId, Token, WatchId};

/// A callback of [`Handler`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Callback {
    /// [`Handler::on_accept`]
    Accept,
    /// [`Handler::on_open`]
    Open,
    /// [`Handler::on_data`]
    Data,
    /// [`Handler::on_eof`]
    Eof,
    /// [`Handler::on_drain`]
    Drain,
    /// [`Handler::on_timeout`]
    Timeout,
    /// [`Handler::on_tagged_timeout`]
    TaggedTimeout,
    /// [`Handler::on_close`]
    Close,
    /// [`Handler::on_accept_error`]
    AcceptError,
    /// [`Handler::on_listener_drained`]
    ListenerDrained,
    /// [`Handler::on_timer`]
    Timer,
    /// [`Handler::on_deferred`]
    Deferred,
    /// [`Handler::on_visit`]
    Visit,
    /// [`Handler::on_swept`]
    Swept,
    /// [`Handler::on_shutdown`]
    Shutdown,
    /// [`Handler::on_wake`]
    Wake,
    /// [`Handler::on_ready`]
    Ready,
    /// [`Handler::on_signal`]
    Signal,
}

impl Callback {
    /// Returns the name of the method.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Callback::Accept => "on_accept",
            Callback::Open => "on_open",
            Callback::Data => "on_data",
            Callback::Eof => "on_eof",
            Callback::Drain => "on_drain",
            Callback::Timeout => "on_timeout",
            Callback::TaggedTimeout => "on_tagged_timeout",
            Callback::Close => "on_close",
            Callback::AcceptError => "on_accept_error",
            Callback::ListenerDrained => "on_listener_drained",
            Callback::Timer => "on_timer",
            Callback::Deferred => "on_deferred",
            Callback::Visit => "on_visit",
            Callback::Swept => "on_swept",
            Callback::Shutdown => "on_shutdown",
            Callback::Wake => "on_wake",
            Callback::Ready => "on_ready",
            Callback::Signal => "on_signal",
        }
    }
}

/// Writes the name of the method.
impl fmt::Display for Callback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The duration of a callback; see [`Stats::callback_longest`](crate::Stats::callback_longest).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CallbackTime {
    /// The callback.
    pub callback: Callback,
    /// The time from its call to its return.
    pub time: Duration,
}

impl CallbackTime {
    /// Returns the longer of two.
    pub(crate) fn longer(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        if other.map(|other| other.time) > one.map(|one| one.time) { other } else { one }
    }
}

/// Times each callback of a handler. Without timing, the reactor calls the handler directly, so that the option costs
/// one comparison per turn.
pub(crate) struct Timed<'a, H: ?Sized>(pub(crate) &'a mut H);

impl<H: Handler + ?Sized> Timed<'_, H> {
    fn time<T>(
        &mut self,
        cx: &mut Context<H::Conn>,
        callback: Callback,
        call: impl FnOnce(&mut H, &mut Context<H::Conn>) -> T,
    ) -> T {
        let called = cx.poller().now();
        let answer = call(self.0, cx);
        let time = cx.poller().now().duration_since(called);
        let stats = cx.stats_mut();
        let this = Some(CallbackTime { callback, time });
        stats.callback_longest = CallbackTime::longer(stats.callback_longest, this);
        answer
    }
}

macro_rules! timed {
    ($($callback:ident $name:ident($($argument:ident: $type:ty),*) $(-> $answer:ty)?;)*) => {
        impl<H: Handler + ?Sized> Handler for Timed<'_, H> {
            type Conn = H::Conn;
            $(
                fn $name(
                    &mut self,
                    cx: &mut Context<H::Conn>,
                    $($argument: $type),*
                ) $(-> $answer)? {
                    self.time(cx, Callback::$callback, |handler, cx| handler.$name(cx, $($argument),*))
                }
            )*
        }

        #[cfg(test)]
        const TIMED: &[(Callback, &str)] = &[$((Callback::$callback, stringify!($name))),*];
    };
}

timed! {
    Accept on_accept(incoming: &Incoming<'_>) -> Option<H::Conn>;
    Open on_open(token: Token, conn: &mut H::Conn);
    Data on_data(token: Token, conn: &mut H::Conn, bytes: &mut [u8]);
    Eof on_eof(token: Token, conn: &mut H::Conn);
    Drain on_drain(token: Token, conn: &mut H::Conn);
    Timeout on_timeout(token: Token, conn: &mut H::Conn);
    TaggedTimeout on_tagged_timeout(token: Token, conn: &mut H::Conn, tag: u64);
    Close on_close(token: Token, conn: H::Conn, reason: CloseReason);
    AcceptError on_accept_error(listener: ListenerId, error: &Error);
    ListenerDrained on_listener_drained(listener: ListenerId);
    Timer on_timer(timer: TimerId);
    Deferred on_deferred(token: Token, conn: &mut H::Conn);
    Visit on_visit(sweep: SweepId, token: Token, conn: &mut H::Conn);
    Swept on_swept(sweep: SweepId);
    Shutdown on_shutdown(token: Token, conn: &mut H::Conn);
    Wake on_wake();
    Ready on_ready(watch: WatchId, readiness: Readiness);
    Signal on_signal(signal: Signal);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A missing callback would silently have its default instead of calling the handler.
    #[test]
    fn each_callback_is_forwarded_and_named() {
        let methods = include_str!("handler.rs").lines();
        let callbacks: Vec<&str> = methods
            .filter_map(|line| line.strip_prefix("    fn "))
            .filter(|method| method.starts_with("on_"))
            .filter_map(|method| method.split('(').next())
            .collect();
        let timed: Vec<&str> = TIMED.iter().map(|&(_, name)| name).collect();
        assert_eq!(timed, callbacks);
        for &(callback, name) in TIMED {
            assert_eq!(callback.name(), name);
        }
    }

    #[test]
    fn the_longer_of_two_times_is_kept() {
        let of =
            |callback, millis| Some(CallbackTime { callback, time: Duration::from_millis(millis) });
        let (short, long) = (of(Callback::Open, 1), of(Callback::Data, 2));
        assert_eq!(CallbackTime::longer(short, long), long);
        assert_eq!(CallbackTime::longer(long, short), long);
        assert_eq!(CallbackTime::longer(None, of(Callback::Eof, 0)), of(Callback::Eof, 0));
        assert_eq!(CallbackTime::longer(short, None), short);
    }
}
