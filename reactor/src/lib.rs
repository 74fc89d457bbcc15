//! A single-threaded epoll reactor for very many connections.
//!
//! A service implements [`Handler`]. The reactor owns the sockets, keeps one slot per connection in a slab, and
//! calls the service when something happens. An idle connection takes 24 bytes plus the service's own state, which is
//! stored inline in its slot: no heap block, no buffer, no task. An armed timeout takes 24 bytes more.
//!
//! A complete echo server:
//!
//! ```no_run
//! use reactor::{Config, Context, Error, Handler, Incoming, ListenOptions, Reactor, Token};
//!
//! struct Echo;
//!
//! impl Handler for Echo {
//!     type Conn = ();
//!     fn on_accept(&mut self, _cx: &mut Context<()>, _incoming: &Incoming<'_>) -> Option<()> {
//!         Some(())
//!     }
//!     fn on_data(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut (), bytes: &mut [u8]) {
//!         if cx.write(token, bytes).is_err() {
//!             cx.abort(token); // the peer sends, but does not read the answers
//!         }
//!     }
//! }
//!
//! fn main() -> Result<(), Error> {
//!     let mut reactor = Reactor::new(&Config::default())?;
//!     reactor.context().listen(([127, 0, 0, 1], 7007), &ListenOptions::default())?;
//!     reactor.run(&mut Echo)
//! }
//! ```
//!
//! # How it works
//! - **Callbacks, static dispatch.** Each callback gets the [`Context`], with which it can write to, close or inspect
//!   *any* connection. The connection's own state is lent to the callback as a plain `&mut`: no `Rc`, no `dyn`.
//! - **Tokens.** A [`Token`] is a slot and a generation. After its connection has been removed, it matches no later
//!   connection in the same slot, until the slot has been reused half a billion times. So late events and stale tokens
//!   are harmless.
//! - **Deferred closing.** [`Context::close`] and [`Context::abort`] only mark the connection. `on_close` is called
//!   after the running callback has returned. Sockets are closed in one place in the code.
//! - **Edge-triggered, one read per event.** A connection is registered with epoll once, and its registration is never
//!   changed. If more may be left to read or to send, the reactor serves the connection again after the others.
//! - **Writes** go to the kernel at once, or at the end of the turn with [registered files](FileTable::Registered).
//!   Bytes that the kernel does not accept wait in a bounded queue.
//! - **Sockets** are held in the process's descriptor table or in registered-file tables of io_uring, which
//!   `RLIMIT_NOFILE` does not count: see [`FileTable`].
//! - **Resource exhaustion.** If descriptors, memory, epoll watches or slots run out, the listener pauses. It resumes
//!   when a connection has closed, or after a delay.
//! - **One thread.** Other threads send messages to a reactor through a bounded [`Mailbox`]. Several reactors, one per
//!   thread, can share a port with `SO_REUSEPORT`.
//! - **Broadcast.** A [`sweep`](Context::sweep) visits all connections in slices; the loop serves events in between.
//! - **Other descriptors**, such as UDP sockets, can be [watched](Context::watch), level-triggered. Unix-domain streams
//!   are ordinary connections.
//!
//! # System calls
//! `accept4` and `epoll_ctl` per accepted connection, `recv` and `send` per message, `close` per connection, and an
//! `ioctl` before it if this side closes first; `socket`, `connect` and `epoll_ctl` per outbound connect. With
//! registered files, the receives, sends and closes of many connections share a call, and so do the moves of sockets
//! into the tables. None of these paths allocates memory.
//!
//! # What it does not do
//! It has no TLS, no file I/O except [`write_file`](Context::write_file), and no thread pool. It runs on Linux only.
//! The [`guide`] shows what to use instead, and how to get from the server above to a complete service.
//!
//! # Features
//! - `bytes`, off by default: a [`Chunk`] can hold a `Bytes` of the `bytes` crate.
//! - `testing`, off by default: the module `testing`, a harness that simulates peers, their bytes and the clock without
//!   sockets. It is meant for dev-dependencies. A reactor with real sockets works in such a build too, and takes one more
//!   comparison per system call.
//!
//! # Stability
//! The crate follows semantic versioning; before 1.0, a minor version may contain breaking changes. The public API is
//! listed in `public-api.txt`, so that reviews show each change. Create [`Config`] and the options with
//! `..Default::default()`: new fields are not breaking changes. Enums that may grow are `#[non_exhaustive]`, and new
//! callbacks of [`Handler`] have a default. No signature contains a type of `nix` or `io-uring`. The oldest supported
//! compiler is the `rust-version` in `Cargo.toml`; raising it is a minor change.

#[cfg(not(target_os = "linux"))]
compile_error!("reactor is built on epoll, signalfd and eventfd: it runs on Linux only");

#[doc = include_str!("../guide.md")]
pub mod guide {}

mod address;
mod callback;
mod config;
mod connection;
mod context;
mod error;
mod handler;
mod interest;
mod mailbox;
mod queue;
mod reactor;
mod signal;
#[cfg(any(test, fuzzing))]
mod simulation;
mod slab;
mod stats;
mod sys;
#[cfg(all(feature = "testing", not(any(test, fuzzing))))]
pub mod testing;
mod token;
mod waker;
mod wheel;

pub use address::Address;
pub use callback::{Callback, CallbackTime};
pub use config::{Config, ConnectOptions, FileTable, Keepalive, ListenOptions};
pub use context::{Context, SweepId};
pub use error::{ChunkRefused, CloseReason, Detached, Error, Refused, WriteError, Written};
pub use handler::{Handler, Incoming};
pub use interest::Interest;
pub use mailbox::{Mailbox, Sender};
pub use queue::{Chunk, SharedPart};
pub use reactor::{Reactor, Status};
pub use signal::Signal;
pub use stats::Stats;
pub use sys::{LentFd, Readiness};
pub use token::{ListenerId, TimerId, Token, WatchId};
pub use waker::Waker;

#[cfg(fuzzing)]
#[doc(hidden)]
pub use simulation::play_bytes;
