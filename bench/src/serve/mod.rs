//! The same echo server once per contestant, each in the best form that its own documentation recommends.
//!
//! Alike in all: the listening sockets (`listeners.rs`), one thread, [`EVENTS`] events a wait where that can be said,
//! accepting as the library likes it, and one receive and one send per message: none reads again after a short read.
//! Where the library lets connections share one read buffer, it has [`BUFFER_BYTES`].

#[cfg(feature = "opponents")]
mod listeners;
#[cfg(feature = "opponents")]
mod mio;
#[cfg(feature = "opponents")]
mod monoio;
#[cfg(feature = "opponents")]
mod polling;
mod reactor;
#[cfg(feature = "opponents")]
mod tokio;

use std::io;
use std::time::Duration;

use ::reactor::FileTable;

/// The read buffer that all connections share.
const BUFFER_BYTES: usize = 64 * 1024;

/// Events taken from the kernel at once.
const EVENTS: usize = 1024;

/// Connections that may wait to be accepted on each listener.
const BACKLOG: i32 = 4096;

/// Who serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Library {
    /// The reactor with descriptors.
    Reactor,
    /// The reactor with registered files.
    Registered,
    #[cfg(feature = "opponents")]
    Mio,
    #[cfg(feature = "opponents")]
    Polling,
    #[cfg(feature = "opponents")]
    Tokio,
    #[cfg(feature = "opponents")]
    Monoio,
}

/// Serves until it is killed.
pub(crate) fn serve(
    library: Library,
    first_port: u16,
    ports: u16,
    idle_timeout: Option<Duration>,
) -> io::Result<()> {
    let addresses = first_port..first_port + ports;
    match library {
        Library::Reactor => reactor::serve(addresses, FileTable::Process, idle_timeout),
        Library::Registered => reactor::serve(addresses, FileTable::Registered, idle_timeout),
        #[cfg(feature = "opponents")]
        Library::Mio => mio::serve(listeners::bound(addresses)?),
        #[cfg(feature = "opponents")]
        Library::Polling => polling::serve(listeners::bound(addresses)?),
        #[cfg(feature = "opponents")]
        Library::Tokio => tokio::serve(listeners::bound(addresses)?, idle_timeout),
        #[cfg(feature = "opponents")]
        Library::Monoio => monoio::serve(listeners::bound(addresses)?),
    }
}

/// Says that the ports are open.
fn say_ready() {
    println!("ready");
}
