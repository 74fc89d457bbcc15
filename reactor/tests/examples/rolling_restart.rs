//! Restarts under load: a successor starts, its predecessor is terminated, and the clients continue throughout.
//!
//! `ROLLING_RESTARTS=30 cargo test -p c1000k-reactor --test examples rolling_restart -- --nocapture` prints the figures of
//! the guide.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use crate::common::descriptors::Descriptors;
use crate::{ANY_PORT, DEADLINE, Example, binary, peer};

/// The number of restarts, unless `ROLLING_RESTARTS` sets it.
const RESTARTS: usize = 3;
/// The number of answers from one restart to the next.
const ANSWERS_BETWEEN: usize = 1000;
/// Half of the clients make a connection per request; the others keep theirs until the service asks them to close it.
const CLIENTS: usize = 8;
/// Handshakes in progress when an instance is terminated, per restart.
const HANDSHAKES: usize = 10;
/// With more lost requests the load ends.
const LOST_MAX: usize = 1000;

/// How an instance gets its listener.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sharing {
    ReusePort,
    HandOver,
}

/// The counts of the clients.
#[derive(Debug, Default)]
struct Load {
    is_over: AtomicBool,
    answered: AtomicUsize,
    connections: AtomicUsize,
    /// Connections that the service asked the client to close.
    ended: AtomicUsize,
    /// Requests without an answer: whether an earlier one on the connection was answered, and the error.
    lost: Mutex<Vec<(bool, ErrorKind)>>,
    /// Requests without an answer on connections whose handshake was in progress.
    handshakes_lost: usize,
}

/// Ends the load on drop, also if the test fails meanwhile, because the scope waits for its threads.
struct Ending<'a>(&'a Load);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Relaxed);
    }
}

impl Load {
    /// Makes connections, with at most this number of requests on each, until the load is over.
    fn run(&self, address: SocketAddr, requests_max: usize) {
        while !self.is_over.load(Relaxed) {
            let mut answered = 0;
            let result = self.use_connection(address, requests_max, &mut answered);
            if let Err(error) = result {
                let mut lost = self.lost.lock().unwrap();
                lost.push((answered > 0, error.kind()));
                if lost.len() >= LOST_MAX {
                    self.is_over.store(true, Relaxed);
                }
            }
        }
    }

    fn use_connection(
        &self,
        address: SocketAddr,
        requests_max: usize,
        answered: &mut usize,
    ) -> io::Result<()> {
        let stream = TcpStream::connect_timeout(&address, DEADLINE)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_nodelay(true)?;
        self.connections.fetch_add(1, Relaxed);
        let mut stream = BufReader::new(stream);
        while *answered < requests_max && !self.is_over.load(Relaxed) {
            let goes_on = request(&mut stream)?;
            *answered += 1;
            self.answered.fetch_add(1, Relaxed);
            if !goes_on {
                self.ended.fetch_add(1, Relaxed);
                break;
            }
        }
        Ok(())
    }

    /// Waits for this number of answers.
    fn until(&self, answered: usize) {
        let deadline = Instant::now() + DEADLINE;
        while self.answered.load(Relaxed) < answered && !self.is_over.load(Relaxed) {
            assert!(Instant::now() < deadline, "too few answers: {self:?}");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Makes a connection without sending the last segment of its handshake, as if the network delayed it: the kernel waits
/// up to 200 ms for data to send with it.
fn begin_handshake(address: SocketAddr) -> BufReader<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_tcp_quickack(false).unwrap();
    socket.connect_timeout(&address.into(), DEADLINE).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.set_tcp_nodelay(true).unwrap();
    BufReader::new(socket.into())
}

/// Sends a request and reads the answer; returns whether the connection may be used again.
fn request(stream: &mut BufReader<TcpStream>) -> io::Result<bool> {
    stream.get_mut().write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")?;
    let (mut head, mut body) = (String::new(), [0; 3]);
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    stream.read_exact(&mut body)?;
    assert!(head.starts_with("HTTP/1.1 200 ") && &body == b"ok\n", "{head}");
    Ok(!head.contains("Connection: close"))
}

/// Starts instances that share a port.
struct Port {
    /// The socket that all instances share, if they do.
    socket: Option<TcpListener>,
    address: SocketAddr,
}

impl Port {
    /// Starts the first instance.
    fn new(sharing: Sharing) -> (Self, Example) {
        match sharing {
            Sharing::ReusePort => {
                let (first, address) = Example::listening("rolling_restart");
                (Self { socket: None, address }, first)
            }
            Sharing::HandOver => {
                let socket = TcpListener::bind(ANY_PORT).unwrap();
                let address = socket.local_addr().unwrap();
                let port = Self { socket: Some(socket), address };
                let first = port.start();
                (port, first)
            }
        }
    }

    /// Starts an instance, and waits until it listens.
    fn start(&self) -> Example {
        let example = match &self.socket {
            None => Example::start("rolling_restart", &[&self.address.to_string()]),
            Some(socket) => {
                let socket = OwnedFd::from(socket.try_clone().unwrap());
                let mut command = Command::new(binary("rolling_restart"));
                Example::spawn(command.arg("-").stdin(Stdio::from(socket)))
            }
        };
        assert_eq!(example.address(), self.address);
        example
    }
}

/// Replaces the service repeatedly under load; returns the counts of the clients.
fn restart_under_load(sharing: Sharing) -> Load {
    let restarts = match std::env::var("ROLLING_RESTARTS") {
        Ok(restarts) => restarts.parse().unwrap(),
        Err(_) => RESTARTS,
    };
    let (port, mut serving) = Port::new(sharing);
    let mut load = Load::default();
    let (mut handshakes, mut handshakes_lost) = (0, 0);
    thread::scope(|scope| {
        let _ending = Ending(&load);
        for number in 0..CLIENTS {
            let requests_max = if number % 2 == 0 { 1 } else { usize::MAX };
            let (load, address) = (&load, port.address);
            scope.spawn(move || load.run(address, requests_max));
        }
        for restart in 1..=restarts {
            // This connection is idle when the signal is received.
            let mut kept = BufReader::new(peer(port.address));
            assert!(
                request(&mut kept).unwrap(),
                "an answer before the signal closes the connection"
            );
            let successor = port.start();
            let under_way: Vec<_> =
                (0..HANDSHAKES).map(|_| begin_handshake(port.address)).collect();
            serving.ask_to_end();
            assert!(
                !request(&mut kept).unwrap(),
                "an answer after the signal does not close the connection"
            );
            drop(kept);
            std::mem::replace(&mut serving, successor).expect_end();
            handshakes += under_way.len();
            let answers = under_way.into_iter().map(|mut stream| request(&mut stream));
            handshakes_lost += answers.filter(Result::is_err).count();
            load.until(restart * ANSWERS_BETWEEN);
        }
    });
    serving.terminate();
    let [answered, connections, ended] =
        [&load.answered, &load.connections, &load.ended].map(|count| count.load(Relaxed));
    load.handshakes_lost = handshakes_lost;
    let lost = load.lost.get_mut().unwrap();
    println!(
        "{sharing:?}, tcp_migrate_req {}: {restarts} restarts. {} requests on {connections} \
         connections, {ended} of which were asked to end: {} lost {lost:?}. {handshakes} \
         handshakes under way: {handshakes_lost} lost.",
        u8::from(migrates()),
        answered + lost.len(),
        lost.len(),
    );
    assert!(answered >= restarts * ANSWERS_BETWEEN, "the load has ended early");
    assert!(ended > 0, "no connection was kept over a restart");
    load
}

/// Whether the kernel moves handshakes from a closed listener to another one of its port.
fn migrates() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv4/tcp_migrate_req")
        .is_ok_and(|value| value.trim() == "1")
}

#[test]
fn rolling_restart_with_a_socket_that_is_handed_over_loses_no_request() {
    let _descriptors = Descriptors::counted();
    let load = restart_under_load(Sharing::HandOver);
    assert_eq!(load.handshakes_lost, 0);
    assert_eq!(load.lost.into_inner().unwrap(), []);
}

/// Accepted requests are answered. Handshakes that complete after the last accept can be lost, unless the kernel moves
/// them.
#[test]
fn rolling_restart_with_reuse_port_loses_no_request_that_was_accepted() {
    let _descriptors = Descriptors::counted();
    let load = restart_under_load(Sharing::ReusePort);
    let lost = load.lost.into_inner().unwrap();
    if migrates() {
        assert_eq!((&lost[..], load.handshakes_lost), (&[][..], 0));
    }
    assert!(lost.iter().all(|&loss| loss == (false, ErrorKind::ConnectionReset)), "{lost:?}");
    assert!(lost.len() * 100 <= load.answered.into_inner(), "{lost:?}");
}
