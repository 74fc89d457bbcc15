//! Blocking connections, with a timeout for each call.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::load::WRONG_ECHO;

/// For each connect, read and write.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Consecutive ports of one address.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ports {
    pub(crate) ip: Ipv4Addr,
    pub(crate) first: u16,
    pub(crate) count: u16,
}

impl Ports {
    /// Round robin.
    pub(crate) fn address(self, number: usize) -> SocketAddr {
        let offset = number % usize::from(self.count);
        SocketAddr::from((self.ip, self.first + offset as u16))
    }
}

pub(crate) fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    connect_within(to, TIMEOUT)
}

fn connect_within(to: SocketAddr, timeout: Duration) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, timeout)?;
    stream.set_nodelay(true)?;
    block(&stream, timeout)?;
    Ok(stream)
}

/// Makes reads and writes block, with a timeout.
pub(crate) fn block(stream: &TcpStream, timeout: Duration) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))
}

/// Reads up to `count` bytes, or until the end of the stream.
pub(crate) fn receive(stream: &TcpStream, count: usize) -> std::io::Result<Vec<u8>> {
    let mut received = Vec::with_capacity(count);
    stream.take(count as u64).read_to_end(&mut received)?;
    Ok(received)
}

/// Sends a message, and reads and verifies its echo.
pub(crate) fn echo(mut stream: &TcpStream, message: &[u8]) -> std::io::Result<()> {
    stream.write_all(message)?;
    let mut received = vec![0; message.len()];
    stream.read_exact(&mut received)?;
    if received != message {
        return Err(std::io::Error::new(ErrorKind::InvalidData, WRONG_ECHO));
    }
    Ok(())
}

/// Whether a new connection gets its echo.
pub(crate) fn is_admitted(to: SocketAddr) -> bool {
    let connected = connect_within(to, Duration::from_secs(5));
    connected.and_then(|stream| echo(&stream, b"are you there?")).is_ok()
}

/// Sends a block repeatedly and reads at the same time; returns whether each echo was correct.
pub(crate) fn pump(stream: &TcpStream, block: &[u8], times: usize) -> Result<bool> {
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut stream = stream;
            (0..times).try_for_each(|_| stream.write_all(block))
        });
        let mut received = vec![0; block.len()];
        let mut stream = stream;
        let mut reads_block = || stream.read_exact(&mut received).is_ok() && received == block;
        let is_correct = (0..times).all(|_| reads_block());
        let sent = sender.join().map_err(|_| anyhow!("the sender panicked"))?;
        Ok(is_correct && sent.is_ok())
    })
}

/// The first of `count` consecutive ports on which nothing listens.
pub(crate) fn free_ports(count: u16) -> Result<u16> {
    // Below the ephemeral ports, which other programs may use up.
    let start = 2_000 + (std::process::id() % 100) as u16 * 40;
    let is_free = |port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok();
    let mut firsts = (start..9_800).step_by(usize::from(count));
    firsts
        .find(|&first| (first..first + count).all(is_free))
        .with_context(|| format!("no {count} consecutive free ports"))
}
