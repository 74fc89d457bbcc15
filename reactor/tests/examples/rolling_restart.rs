//! Thirty restarts under load.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::descriptors::Descriptors;
use crate::{DEADLINE, Example};

const RESTARTS: usize = 30;
/// Answered before the next restart.
const REQUESTS_BETWEEN: usize = 1000;
const CLIENTS: usize = 4;

#[derive(Default)]
struct Load {
    is_over: AtomicBool,
    answered: AtomicUsize,
    connections: AtomicUsize,
    /// Connections that the service asked to end.
    ended: AtomicUsize,
}

/// Ends the load, also where the test fails in the middle of it: its threads are waited for.
struct Ending<'a>(&'a Load);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Relaxed);
    }
}

impl Load {
    /// Makes connections and at most so many requests on each, until it is over. Every error is a lost request.
    fn run(&self, address: SocketAddr, requests_max: usize) -> io::Result<()> {
        while !self.is_over.load(Relaxed) {
            let stream = TcpStream::connect_timeout(&address, DEADLINE)?;
            stream.set_read_timeout(Some(DEADLINE))?;
            stream.set_nodelay(true)?;
            self.connections.fetch_add(1, Relaxed);
            let mut reader = BufReader::new(stream);
            for _ in 0..requests_max {
                let goes_on = request(&mut reader)?;
                self.answered.fetch_add(1, Relaxed);
                if !goes_on {
                    self.ended.fetch_add(1, Relaxed);
                    break;
                }
            }
        }
        Ok(())
    }

    fn until(&self, answered: usize) {
        let deadline = Instant::now() + DEADLINE;
        while self.answered.load(Relaxed) < answered && !self.is_over.load(Relaxed) {
            assert!(Instant::now() < deadline, "{} are answered", self.answered.load(Relaxed));
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Whether the connection may be used again.
fn request(stream: &mut BufReader<TcpStream>) -> io::Result<bool> {
    stream.get_mut().write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")?;
    let (mut head, mut body) = (String::new(), [0; 3]);
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    stream.read_exact(&mut body)?;
    assert!(head.starts_with("HTTP/1.1 200 ") && &body == b"ok\n", "{head}");
    Ok(!head.contains("Connection: close"))
}

#[test]
fn rolling_restart_loses_no_request_in_thirty() {
    let _descriptors = Descriptors::counted();
    let (mut serving, address) = Example::listening("rolling_restart");
    let load = Load::default();
    let lost = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                // Some make a connection for each request, some keep theirs until they are asked to end.
                let requests_max = if number % 2 == 0 { 1 } else { usize::MAX };
                let load = &load;
                scope.spawn(move || {
                    let result = load.run(address, requests_max);
                    load.is_over.store(true, Relaxed);
                    result
                })
            })
            .collect();
        let ending = Ending(&load);
        for restart in 1..=RESTARTS {
            let successor = Example::start("rolling_restart", &[&address.to_string()]);
            assert_eq!(successor.address(), address);
            std::mem::replace(&mut serving, successor).terminate();
            load.until(restart * REQUESTS_BETWEEN);
        }
        drop(ending);
        let results = clients.into_iter().map(|client| client.join().unwrap());
        results.filter_map(Result::err).collect::<Vec<_>>()
    });
    let [answered, connections, ended] =
        [&load.answered, &load.connections, &load.ended].map(|count| count.load(Relaxed));
    println!(
        "{answered} requests on {connections} connections, {ended} of which were asked to end"
    );
    assert!(lost.is_empty(), "lost: {lost:?}");
    assert!(answered >= RESTARTS * REQUESTS_BETWEEN);
    assert!(ended > 0, "no connection was kept over a restart");
    serving.terminate();
}
