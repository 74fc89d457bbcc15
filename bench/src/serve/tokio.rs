//! tokio's current-thread runtime, a task per listener and a task per connection.
//!
//! A task with its own buffer would take more memory while it waits. `poll_read` needs the buffer only while it is
//! polled, so all connections share one. It also detects that a short read has emptied the socket.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::{BUFFER_BYTES, say_ready};

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER_BYTES]);
}

pub(super) fn serve(
    listeners: Vec<std::net::TcpListener>,
    idle_timeout: Option<Duration>,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        for listener in listeners {
            tokio::spawn(accept_all(TcpListener::from_std(listener)?, idle_timeout));
        }
        say_ready();
        std::future::pending().await
    })
}

async fn accept_all(listener: TcpListener, idle_timeout: Option<Duration>) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        match idle_timeout {
            None => tokio::spawn(echo_all(stream)),
            Some(idle_timeout) => tokio::spawn(echo_until_idle(stream, idle_timeout)),
        };
    }
}

async fn echo_all(mut stream: TcpStream) -> io::Result<()> {
    while echo(&mut stream).await? {}
    Ok(())
}

async fn echo_until_idle(mut stream: TcpStream, idle_timeout: Duration) -> io::Result<()> {
    while timeout(idle_timeout, echo(&mut stream)).await?? {}
    Ok(())
}

/// Returns whether the connection stays open.
async fn echo(stream: &mut TcpStream) -> io::Result<bool> {
    let (received, left) = poll_fn(|cx| poll_echo(stream, cx)).await?;
    if !left.is_empty() {
        stream.write_all(&left).await?;
    }
    Ok(received > 0)
}

/// Receives and sends at once; returns the bytes that the kernel did not accept.
fn poll_echo(stream: &mut TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<(usize, Vec<u8>)>> {
    BUFFER.with_borrow_mut(|buffer| {
        let mut buffer = ReadBuf::new(buffer);
        ready!(Pin::new(&mut *stream).poll_read(cx, &mut buffer))?;
        let received = buffer.filled();
        let sent = match stream.try_write(received) {
            Ok(sent) => sent,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Poll::Ready(Err(error)),
        };
        Poll::Ready(Ok((received.len(), received[sent..].to_vec())))
    })
}
