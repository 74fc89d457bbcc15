//! The same echo server for each library, in the best form that the library's documentation recommends.
//!
//! All have in common: the listening sockets (`listeners.rs`), one thread, [`EVENTS`] events per wait if that can be
//! set, accepting in the library's usual way, and one receive and one send per message: none reads again after a short
//! read. If the library allows connections to share one read buffer, its size is [`BUFFER_BYTES`].

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

/// The maximum number of events per wait.
const EVENTS: usize = 1024;

/// The backlog of each listener.
const BACKLOG: i32 = 4096;

/// The library that serves.
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

/// Reports that the ports are open.
fn say_ready() {
    println!("ready");
}
