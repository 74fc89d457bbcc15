//! monoio on io_uring, as its own echo example is built.
//!
//! A receive that is under way owns its buffer, so each connection has one of its own.

use std::io;

use monoio::io::{AsyncReadRent, AsyncWriteRentExt};
use monoio::net::{TcpListener, TcpStream};
use monoio::{IoUringDriver, RuntimeBuilder};

use super::say_ready;

/// Small, so that monoio's memory per connection is not that of a needlessly large buffer.
const CONNECTION_BUFFER_BYTES: usize = 1024;

pub(super) fn serve(listeners: Vec<std::net::TcpListener>) -> io::Result<()> {
    let mut runtime = RuntimeBuilder::<IoUringDriver>::new().build()?;
    runtime.block_on(async {
        for listener in listeners {
            // io_uring waits by itself: on a non-blocking socket it would report EAGAIN instead.
            listener.set_nonblocking(false)?;
            monoio::spawn(accept_all(TcpListener::from_std(listener)?));
        }
        say_ready();
        std::future::pending().await
    })
}

async fn accept_all(listener: TcpListener) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        monoio::spawn(echo_all(stream));
    }
}

async fn echo_all(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(CONNECTION_BUFFER_BYTES);
    loop {
        let (received, filled) = stream.read(buffer).await;
        if received? == 0 {
            return Ok(());
        }
        let (sent, emptied) = stream.write_all(filled).await;
        sent?;
        buffer = emptied;
        buffer.clear();
    }
}
