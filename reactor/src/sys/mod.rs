//! The interface to the operating system: the only folder that uses `nix`, `io-uring` and `unsafe`.
//!
//! A backend provides the types and functions listed below. Each function is a thin, safe wrapper of one system call, or
//! of a few for setup. There are two backends: the real one, and in unit tests and under the fuzzer the [`fake`] one,
//! which has the same names and makes no system calls. With the feature `testing`, each reactor uses one of the two
//! ([`switch`]).
//!
//! | file | contents |
//! | --- | --- |
//! | `poller.rs` | epoll: level-triggered for listeners and watches, edge-triggered for connections |
//! | `socket.rs` | descriptors, and calls on sockets |
//! | `options.rs` | socket options |
//! | `sockets.rs` | a connection's socket, in the process's descriptor table or in a registered-file table |
//! | `registered.rs` | the registered-file tables of io_uring |
//! | `batch.rs` | receives and sends that are submitted together |
//! | `wake.rs`, `signal.rs` | an eventfd and a signalfd |
//! | `readiness.rs` | the events of epoll |
//! | `switch.rs` | with the feature `testing`: the choice of the real backend or the fake one |
//! | `lent.rs` | a borrowed or temporary descriptor of a connection |

#![allow(unsafe_code)]
// The only exception in the workspace; each block says why it is sound.
// The fake backend replaces a part of the real one, or is itself used only in part.
#![cfg_attr(any(test, fuzzing, feature = "testing"), allow(dead_code, unused_imports))]

mod batch;
#[cfg(any(test, fuzzing, feature = "testing"))]
pub(crate) mod fake;
mod lent;
mod options;
mod poller;
mod readiness;
mod registered;
mod signal;
mod socket;
mod sockets;
#[cfg(all(feature = "testing", not(any(test, fuzzing))))]
mod switch;
mod wake;

use std::io;

use nix::errno::Errno;

use crate::error::Error;

pub(crate) use batch::{ReceiveBatch, SendBatch};
pub use lent::LentFd;
pub(crate) use nix::libc::{EADDRNOTAVAIL, EMFILE};
pub use readiness::Readiness;

#[cfg(any(test, fuzzing))]
pub(crate) use fake::*;
#[cfg(all(feature = "testing", not(any(test, fuzzing))))]
pub(crate) use switch::*;
#[cfg(not(any(test, fuzzing, feature = "testing")))]
pub(crate) use {
    options::{
        defer_source_port, reset_on_close, set_keepalive, set_nodelay, set_notsent_lowat,
        set_port_range, set_receive_buffer, set_send_buffer, set_user_timeout,
    },
    poller::{Events, Poller},
    signal::SignalReader,
    socket::{Descriptor, accept, adopt, bind, connect, listen, local_addr, peer_addr, spare},
    sockets::{Socket, Sockets},
    wake::WakeFd,
};

#[cfg(not(any(test, fuzzing, feature = "testing")))]
pub(crate) type Accepted = AcceptResult<Descriptor>;

fn refused(call: &'static str) -> impl FnOnce(Errno) -> Error {
    move |errno| Error::System { call, source: io::Error::from_raw_os_error(errno as i32) }
}

/// The error of a call that failed because there is no memory.
pub(crate) fn no_memory(call: &'static str) -> Error {
    refused(call)(Errno::ENOMEM)
}

/// What an adopted socket is to be used as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Adopted {
    Connection,
    Listener,
}

/// The result of an accept.
#[derive(Debug)]
pub(crate) enum AcceptResult<D> {
    Connection(D),
    /// The backlog is empty.
    Empty,
    /// A connection failed before it was accepted, because of the peer or the network; there may be others.
    Lost(Error),
    /// Descriptors or memory ran out.
    Exhausted(Error),
    /// The listener itself has failed.
    Broken(Error),
}

/// Classifies the result of an accept.
#[inline]
fn accept_result<D>(answer: nix::Result<D>) -> AcceptResult<D> {
    match answer {
        Ok(socket) => AcceptResult::Connection(socket),
        Err(Errno::EAGAIN) => AcceptResult::Empty,
        Err(errno) => accept_failure(errno),
    }
}

#[cold]
fn accept_failure<D>(errno: Errno) -> AcceptResult<D> {
    let error = refused("accept4")(errno);
    match errno {
        // accept(2): Linux reports pending network errors of the new socket; they are to be treated like EAGAIN.
        Errno::EINTR
        | Errno::ECONNABORTED
        | Errno::EPROTO
        | Errno::EPERM
        | Errno::ENETDOWN
        | Errno::ENOPROTOOPT
        | Errno::EHOSTDOWN
        | Errno::ENONET
        | Errno::EHOSTUNREACH
        | Errno::ENETUNREACH
        | Errno::ETIMEDOUT => AcceptResult::Lost(error),
        Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM => {
            AcceptResult::Exhausted(error)
        }
        _ => AcceptResult::Broken(error),
    }
}

/// The result of a read or a write.
#[derive(Debug)]
pub(crate) enum IoResult {
    Bytes(usize),
    /// The operation would block; epoll reports when it is possible.
    NotNow,
    /// Interrupted by a signal: epoll will not report the event again.
    Interrupted,
    Failed(Error),
}

/// Classifies the result of a read or a write.
#[inline]
fn io_result(call: &'static str, answer: nix::Result<usize>) -> IoResult {
    match answer {
        Ok(bytes) => IoResult::Bytes(bytes),
        Err(errno) => io_failure(call, errno),
    }
}

/// Not inlined, so that the common case is small enough to be inlined.
#[cold]
fn io_failure(call: &'static str, errno: Errno) -> IoResult {
    match errno {
        Errno::EAGAIN | Errno::ENOBUFS => IoResult::NotNow,
        Errno::EINTR => IoResult::Interrupted,
        errno => IoResult::Failed(refused(call)(errno)),
    }
}

/// Converts a result of io_uring to one of nix.
#[inline]
fn ring_answer(result: i32) -> nix::Result<usize> {
    usize::try_from(result).map_err(|_| Errno::from_raw(-result))
}
