//! A single-threaded epoll reactor for very many connections.
//!
//! A service implements [`Handler`]; the reactor owns the sockets, keeps one slot per connection in a slab, and
//! calls the service when something happens. An idle connection costs 24 bytes and the service's own state, inline in
//! its slot: no heap block, no buffer, no task. An armed timeout adds 24 bytes.
//!
//! A whole echo server:
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
//!             cx.abort(token); // a peer that sends without reading what comes back
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
//! - **Push style, static dispatch.** Each callback gets the [`Context`], with which it may write to, close or look at
//!   *any* connection. The state of the connection at hand is lent to the callback: plain `&mut`, no `Rc`, no `dyn`.
//! - **Tokens.** A [`Token`] is a slot and a generation. After the connection is gone it matches nothing, though its
//!   slot and its descriptor are used again, half a billion times: events and callers that come late do no harm.
//! - **Closing is deferred.** [`Context::close`] and [`Context::abort`] mark; `on_close` follows after the callback has
//!   returned. One place in the code closes sockets.
//! - **Edge-triggered, one read per report**: a connection is registered with epoll once, and its registration is never
//!   changed. Where more may be left to read or to send, the reactor serves the connection again after the others.
//! - **Writing** goes to the kernel at once, or with [registered files](FileTable::Registered) at the end of the turn;
//!   what the kernel does not take waits in a bounded queue.
//! - **Sockets** are held in the process's descriptor table or in registered-file tables of io_uring, which
//!   `RLIMIT_NOFILE` does not count: see [`FileTable`]. A handler sees no difference.
//! - **Running out** of descriptors, memory, epoll watches or slots is a state and not a fault: the listener pauses,
//!   and comes back when a connection has closed or after a while.
//! - **One thread.** Other threads send it messages through a bounded [`Mailbox`]; several reactors, one per thread,
//!   share a port by `SO_REUSEPORT`.
//! - **Broadcast**: a [`sweep`](Context::sweep) visits all connections in slices, and the loop goes on in between.
//! - **Other descriptors**, UDP sockets for example, are [watched](Context::watch), level-triggered; Unix-domain streams
//!   are connections like others.
//!
//! # What it costs
//! `accept4` and `epoll_ctl` per accepted connection, `recv` and `send` per message, `close` per connection, with an
//! `ioctl` before it where this side ends first; `socket`, `connect` and `epoll_ctl` per outbound connect. With
//! registered files, receives, sends and closes of many connections share a call, and so do the moves of sockets into
//! the tables. There is no allocation on any of these paths.
//!
//! # What it is not
//! There is no TLS, no file I/O but [`write_file`](Context::write_file), and no thread pool here, and it runs on Linux only. The [`guide`] says what to take for
//! these, and how to get from the fifteen lines above to a service.
//!
//! # Features
//! - `bytes`, off by default: a [`Chunk`] can be a `Bytes` of the `bytes` crate.
//! - `testing`, off by default: the module `testing`, a harness that feeds a handler peers, bytes and time without a
//!   socket. It is meant for dev-dependencies; a reactor with real sockets works in such a build too, at a comparison
//!   for each system call.
//!
//! # Stability
//! The crate follows semantic versioning; before 1.0 a minor version may break. The public surface is kept in
//! `public-api.txt`, so that a change of it is seen in review. Make [`Config`] and the options with
//! `..Default::default()`: a new field is no breaking change. Enums that may grow are `#[non_exhaustive]`, and a new
//! callback of [`Handler`] comes with a default. The crate's types are its own: nothing of `nix` or `io-uring` is in a
//! signature. The oldest compiler is the `rust-version` of `Cargo.toml`; raising it is a minor change.

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
