//! A single-threaded epoll reactor for very many connections.

#[cfg(not(target_os = "linux"))]
compile_error!("reactor is built on epoll, signalfd and eventfd: it runs on Linux only");

mod config;
mod connection;
mod context;
mod error;
mod handler;
mod queue;
mod reactor;
mod signal;
mod slab;
mod stats;
mod sys;
mod token;
mod waker;
mod wheel;

pub use config::{Config, ConnectOptions, ListenOptions};
pub use context::Context;
pub use error::{CloseReason, Error, WriteError, Written};
pub use handler::{Handler, Incoming};
pub use queue::Chunk;
pub use reactor::{Reactor, Status};
pub use signal::Signal;
pub use stats::Stats;
pub use token::{ListenerId, TimerId, Token};
pub use waker::Waker;
