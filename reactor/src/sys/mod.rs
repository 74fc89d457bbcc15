//! The edge to the operating system: the one folder that names `nix` and `io-uring`, and the only one with `unsafe`.
//!
//! A backend provides the types and functions listed below, each thin and safe with one system call in it, or a few for
//! setting up. There are two: the real one, and in unit tests and under the fuzzer the [`fake`] one, which has the same
//! names and nothing real behind them. With the feature `testing` each reactor has the one or the other ([`switch`]).
//!
//! | file | what is in it |
//! | --- | --- |
//! | `poller.rs` | epoll: level-triggered for listeners and watches, edge-triggered for connections |
//! | `socket.rs` | descriptors, and the calls on those that are sockets |
//! | `options.rs` | socket options |
//! | `sockets.rs` | a connection's socket, in the process's descriptor table or in a registered-file table |
//! | `registered.rs` | the registered-file tables of io_uring |
//! | `batch.rs` | receives and sends that go to the kernel together |
//! | `wake.rs`, `signal.rs` | an eventfd and a signalfd |
//! | `readiness.rs` | what epoll reports |
//! | `switch.rs` | with the feature `testing`: the real backend or the fake one |
//! | `lent.rs` | a connection's descriptor for the while |

#![allow(unsafe_code)]
// The one exception of the workspace; each block says why it is sound.
// The fake backend stands in for a part of it, or is used in part.
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

/// A call that was refused for want of memory.
pub(crate) fn no_memory(call: &'static str) -> Error {
    refused(call)(Errno::ENOMEM)
}

/// What a socket that was made elsewhere is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Adopted {
    Connection,
    Listener,
}

/// What became of an accept.
#[derive(Debug)]
pub(crate) enum AcceptResult<D> {
    Connection(D),
    /// No peer waits.
    Empty,
    /// This one was lost before it was accepted, by the peer or the network; the next may be there.
    Lost(Error),
    /// Descriptors or memory ran out.
    Exhausted(Error),
    /// The listener itself is at fault.
    Broken(Error),
}

/// What the answer of an accept means.
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
        // accept(2): Linux passes errors of the new socket on; they are to be treated like a retry.
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

/// What became of a read or a write.
#[derive(Debug)]
pub(crate) enum IoResult {
    Bytes(usize),
    /// The kernel can't take or give anything now; epoll reports when it can.
    NotNow,
    /// Cut off by a signal: epoll will not report again what was there.
    Interrupted,
    Failed(Error),
}

/// What the answer of a read or a write means.
#[inline]
fn io_result(call: &'static str, answer: nix::Result<usize>) -> IoResult {
    match answer {
        Ok(bytes) => IoResult::Bytes(bytes),
        Err(errno) => io_failure(call, errno),
    }
}

/// Out of the way, so that the usual case is small enough to be inlined.
#[cold]
fn io_failure(call: &'static str, errno: Errno) -> IoResult {
    match errno {
        Errno::EAGAIN | Errno::ENOBUFS => IoResult::NotNow,
        Errno::EINTR => IoResult::Interrupted,
        errno => IoResult::Failed(refused(call)(errno)),
    }
}

/// What io_uring has answered, as nix would put it.
#[inline]
fn ring_answer(result: i32) -> nix::Result<usize> {
    usize::try_from(result).map_err(|_| Errno::from_raw(-result))
}
