//! monoio on io_uring, like its echo example.
//!
//! A pending receive owns its buffer, so each connection has its own.

use std::io;

use monoio::io::{AsyncReadRent, AsyncWriteRentExt};
use monoio::net::{TcpListener, TcpStream};
use monoio::{IoUringDriver, RuntimeBuilder};

use super::say_ready;

/// Small, so that the buffer does not dominate monoio's memory per connection.
const CONNECTION_BUFFER_BYTES: usize = 1024;

pub(super) fn serve(listeners: Vec<std::net::TcpListener>) -> io::Result<()> {
    let mut runtime = RuntimeBuilder::<IoUringDriver>::new().build()?;
    runtime.block_on(async {
        for listener in listeners {
            // io_uring itself waits; on a non-blocking socket it would return EAGAIN instead.
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
