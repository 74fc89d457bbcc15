//! The server as clients see it: echoes, refusals, bounds.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use common::{
    DEADLINE, Server, connect, connect_from, echo, echo_all, fill, is_refused, pattern,
    read_to_end, try_connect, until,
};
use nix::sys::signal::Signal;

#[test]
fn each_port_echoes_and_the_record_counts_it() {
    let server = Server::start(5, &[]);
    let streams: Vec<TcpStream> = (0..5).map(|offset| server.connect(offset)).collect();
    for (index, stream) in streams.iter().enumerate() {
        echo(stream, format!("Hello Server, connections num:{index}").as_bytes());
        echo(stream, &vec![index as u8; 300_000]);
    }
    let record = server.stop();
    assert_eq!((record.accepted, record.peak, record.refused), (5, 5, 0));
    assert_eq!(record.bytes_in, record.bytes_out);
    assert!(record.bytes_in >= 5 * 300_000, "{}", record.bytes_in);
}

#[test]
fn status_lines_have_a_singular_and_no_kernel_memory_without_a_connection() {
    let mut server = Server::start(1, &[]);
    let port = server.first_port;
    assert!(server.sees_line(&format!("listening on 1 port, 127.0.0.1:{port}, for ")));
    assert!(server.sees_line(" 0 connections |"));
    let idle = server.lines_with(" 0 connections |");
    assert!(idle.iter().all(|line| !line.contains("kernel")), "{idle:?}");
    let stream = server.connect(0);
    echo(&stream, b"Hello Server");
    assert!(server.sees_line(" 1 connection |"));
    assert!(server.lines_with(" 1 connection |")[0].contains("kernel"));
}

#[test]
fn a_half_closed_connection_gets_the_rest_of_its_echo() {
    let server = Server::start(1, &[]);
    let stream = server.connect(0);
    let sent: Vec<u8> = (0..1_000_000).map(pattern).collect();
    let writer = {
        let mut stream = stream.try_clone().unwrap();
        let sent = sent.clone();
        std::thread::spawn(move || {
            stream.write_all(&sent).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        })
    };
    let (received, end) = read_to_end(&stream);
    writer.join().unwrap();
    assert!(end.is_ok() && received == sent, "{} bytes, then {end:?}", received.len());
    assert_eq!(server.stop().bytes_out, 1_000_000);
}

#[test]
fn a_sink_reads_and_sends_nothing() {
    let server = Server::start(1, &["--mode", "sink"]);
    let mut stream = server.connect(0);
    stream.write_all(&vec![7; 1_000_000]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let (received, end) = read_to_end(&stream);
    assert!(received.is_empty() && end.is_ok(), "{} bytes, {end:?}", received.len());
    let record = server.stop();
    assert_eq!((record.bytes_in, record.bytes_out, record.accepted), (1_000_000, 0, 1));
}

#[test]
fn past_max_connections_peers_are_reset_until_there_is_room() {
    let mut server = Server::start(2, &["--max-connections", "3"]);
    let mut held: Vec<TcpStream> = (0..3).map(|index| server.connect(index % 2)).collect();
    echo_all(&held, b"held");
    for _ in 0..2 {
        assert!(server.refuses(0));
    }
    assert!(server.sees_line("at capacity: "));
    assert_eq!(server.lines_with("at capacity: ").len(), 1, "not one for each refusal");
    echo_all(&held, b"still held");

    held.pop();
    let refusals = 2 + server.refusals_until_room(1);
    let record = server.stop();
    assert_eq!((record.peak, record.accepted), (3, 4));
    assert_eq!(record.refused_by.get("max_connections"), Some(&refusals));
}

#[test]
fn under_a_hard_descriptor_limit_it_holds_what_fits_and_refuses_the_rest() {
    let server = Server::start_limited(256, 4, &["--file-table", "process"]);
    let streams: Vec<TcpStream> =
        (0..300).filter_map(|index| try_connect(server.address(index % 4))).collect();
    let held: Vec<&TcpStream> = streams.iter().filter(|stream| !is_refused(stream)).collect();
    assert!(held.len() >= 200 && held.len() < 256, "{} are held", held.len());
    echo_all(&held, b"held");
    let fit = held.len() as u64;
    let record = server.stop();
    assert_eq!((record.accepted, record.refused), (fit, 300 - fit));
    assert!(record.wakeups < 3_000, "{} wake-ups", record.wakeups);
}

#[test]
fn descriptors_that_were_inherited_take_room_from_connections() {
    // Not every shell opens descriptors above 9.
    let inherit = "ulimit -n 256 && exec bash -c 'for fd in {10..207}; do eval \"exec $fd</dev/null\"; done; exec \"$0\" \"$@\"' \"$0\" \"$@\";";
    let mut server = Server::start_by(inherit, 4, &["--file-table", "process"]);
    assert!(server.sees_line(" were open at the start"));
    let ready = server.lines_with("ready: ").remove(0);
    let room: usize = ready.split_whitespace().rev().nth(1).unwrap().parse().unwrap();
    assert!((30..=38).contains(&room), "{ready}");
    let streams: Vec<TcpStream> =
        (0..60).filter_map(|index| try_connect(server.address(index % 4))).collect();
    let held = streams.iter().filter(|stream| !is_refused(stream)).count();
    assert_eq!(held, room, "the number that it logged");
    let record = server.stop();
    assert_eq!(record.refused_by.get("max_connections"), Some(&(60 - room as u64)), "{record:?}");
}

#[test]
fn a_peer_that_reads_nothing_costs_a_bounded_queue_and_delays_no_bystander() {
    let server = Server::start(2, &[]);
    let bystander = server.connect(1);
    echo(&bystander, b"before");
    let rss_before = server.rss_bytes();
    let slow = server.connect(0);
    let taken = fill(&slow, Duration::from_millis(500), 256 << 20);
    assert!(taken < 256 << 20, "the writer was not slowed down");
    let slowest = (0..200).map(|_| echo(&bystander, b"bystander")).max().unwrap();
    assert!(slowest < Duration::from_secs(2), "the bystander waited {slowest:?}");
    let grown = server.rss_bytes().saturating_sub(rss_before);
    assert!(grown < 2 << 20, "the process grew by {grown} bytes");

    slow.shutdown(Shutdown::Write).unwrap();
    let (received, end) = read_to_end(&slow);
    assert!(end.is_ok() && received.len() == taken, "{} of {taken}, {end:?}", received.len());
    assert!(received.iter().enumerate().all(|(position, &byte)| byte == pattern(position)));
    server.stop();
}

#[test]
fn a_reader_that_stays_slow_is_dropped_after_its_time() {
    let mut server = Server::start(1, &["--slow-reader-timeout", "300ms"]);
    let patient = server.connect(0);
    let slow = server.connect(0);
    fill(&slow, Duration::from_millis(150), 256 << 20);
    assert!(server.sees_line("reads too slowly"));
    drop(read_to_end(&slow));
    echo(&patient, b"untouched");
    assert_eq!(server.stop().closed_by.get("slow_reader"), Some(&1));
}

#[test]
fn a_reader_that_takes_a_little_at_times_is_slow_too() {
    const STEPS: u32 = 20;
    let timeout = Duration::from_secs(3);
    let mut server = Server::start(1, &["--slow-reader-timeout", "3s"]);
    let slow = server.connect(0);
    fill(&slow, Duration::from_millis(50), 256 << 20);
    let waiting = sending_bytes(server.first_port, slow.local_addr().unwrap().port());
    // Three quarters of the queued data within the time: enough to empty the server's queue, while more is always sent.
    let mut piece = vec![0; waiting * 3 / 4 / STEPS as usize];
    slow.set_nonblocking(true).unwrap();
    let started = Instant::now();
    let is_reset = (1..).any(|step| {
        assert!(started.elapsed() < DEADLINE, "it does not end, with {waiting} bytes queued");
        std::thread::sleep((timeout / STEPS * step).saturating_sub(started.elapsed()));
        let read = std::io::Read::read(&mut &slow, &mut piece);
        let written = std::iter::repeat_with(|| (&slow).write(&[0; 65_536])).find(Result::is_err);
        let ended = |error: std::io::Error| error.kind() != std::io::ErrorKind::WouldBlock;
        read.err().is_some_and(ended) || written.unwrap().err().is_some_and(ended)
    });
    assert!(is_reset && server.sees_line("reads too slowly"));
    assert_eq!(server.stop().closed_by.get("slow_reader"), Some(&1));
}

#[test]
fn unread_data_of_a_finished_peer_is_dropped_in_time() {
    let server = Server::start(1, &["--tcp-user-timeout", "1s"]);
    let slow = server.connect(0);
    fill(&slow, Duration::from_millis(150), 1 << 20);
    slow.shutdown(Shutdown::Write).unwrap();
    let local = slow.local_addr().unwrap().port();
    let end = || state_of(server.first_port, local);
    // On a busy machine the socket may be gone before the next check.
    let is_closed = || matches!(end(), Some(LAST_ACK) | None);
    assert!(until(DEADLINE, is_closed), "the server has not closed: {:?}", end());
    assert!(until(DEADLINE, || end().is_none()), "the kernel keeps it: {:?}", end());
    server.stop();
}

/// The kernel's numbers of the states.
const LAST_ACK: u8 = 9;

/// The state of the socket with these ports, if there is one.
fn state_of(local: u16, peer: u16) -> Option<u8> {
    let state = fields_of(local, peer)?.remove(3);
    Some(u8::from_str_radix(&state, 16).unwrap())
}

/// The unacknowledged bytes that the socket with these ports has sent.
fn sending_bytes(local: u16, peer: u16) -> usize {
    let mut fields = None;
    // The table may omit a socket while others open and close.
    until(DEADLINE, || {
        fields = fields_of(local, peer);
        fields.is_some()
    });
    let queues = fields.expect("it is open").remove(4);
    usize::from_str_radix(queues.split(':').next().unwrap(), 16).unwrap()
}

/// The fields of the kernel's table for the socket with these ports, if there is one.
fn fields_of(local: u16, peer: u16) -> Option<Vec<String>> {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("Linux has it");
    let port = |address: &str| u16::from_str_radix(address.rsplit(':').next()?, 16).ok();
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        ((port(&fields[1])?, port(&fields[2])?) == (local, peer)).then_some(fields)
    })
}

#[test]
fn a_silent_connection_is_closed_and_a_talking_one_is_not() {
    let server = Server::start(1, &["--idle-timeout", "400ms"]);
    let silent = server.connect(0);
    let talking = server.connect(0);
    let started = Instant::now();
    silent.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let mut byte = [0];
    let ended = until(DEADLINE, || {
        echo(&talking, b"talk");
        matches!(std::io::Read::read(&mut &silent, &mut byte), Ok(0))
    });
    assert!(ended && started.elapsed() >= Duration::from_millis(390), "{:?}", started.elapsed());
    echo(&talking, b"still there");
    assert_eq!(server.stop().closed_by.get("idle"), Some(&1));
}

#[test]
fn when_all_leave_at_once_each_of_them_is_closed() {
    let server = Server::start(1, &[]);
    let staying = server.connect(0);
    echo(&staying, b"here");
    let before = server.descriptors();
    let leaving: Vec<TcpStream> = (0..500).map(|_| server.connect(0)).collect();
    echo_all(&leaving, b"for a moment");
    leaving.iter().for_each(|stream| stream.shutdown(Shutdown::Write).unwrap());
    assert!(leaving.iter().all(|stream| read_to_end(stream).1.is_ok()), "each gets its end");
    assert!(until(DEADLINE, || server.descriptors() <= before));
    echo(&staying, b"still here");
    assert_eq!(server.stop().closed, 501);
}

#[test]
fn no_peer_is_refused_while_finished_connections_wait_to_be_closed() {
    const CONNECTIONS: u16 = 1_000;
    // Fewer than before: one of two threads may accept new connections before the other has found its peers gone.
    const NEWCOMERS: u16 = 800;
    const PORTS: u16 = 4;
    for threads in ["1", "2"] {
        let most = CONNECTIONS.to_string();
        let server = Server::start(PORTS, &["--max-connections", &most, "--threads", threads]);
        let crowd = |count| -> Vec<TcpStream> {
            (0..count).map(|index| server.connect(index % PORTS)).collect()
        };
        let leaving = crowd(CONNECTIONS);
        echo_all(&leaving, b"for a moment");
        // When it continues, it finds all of them gone, and the same number waiting.
        server.signal(Signal::SIGSTOP);
        leaving.iter().for_each(|stream| stream.shutdown(Shutdown::Write).unwrap());
        let newcomers = crowd(NEWCOMERS);
        server.signal(Signal::SIGCONT);
        echo_all(&newcomers, b"there is a place for each");
        let record = server.stop();
        let expected = (u64::from(CONNECTIONS + NEWCOMERS), 0, u64::from(CONNECTIONS));
        assert_eq!((record.accepted, record.refused, record.peak), expected, "{record:?}");
    }
}

#[test]
fn it_listens_on_ipv6() {
    let server = Server::start(1, &["--bind", "::1"]);
    let stream = connect(SocketAddr::from((Ipv6Addr::LOCALHOST, server.first_port)));
    echo(&stream, b"six");
    assert_eq!(server.stop().accepted, 1);
}

#[test]
fn one_source_gets_its_share_and_others_are_still_admitted() {
    let mut server = Server::start(2, &["--max-per-source", "3"]);
    let other = Ipv4Addr::new(127, 0, 0, 2).into();
    let mut held: Vec<TcpStream> = (0..3).map(|_| server.connect(0)).collect();
    echo_all(&held, b"held");
    assert!(server.refuses(1));
    let elsewhere = connect_from(other, server.address(1));
    echo(&elsewhere, b"from another address");
    assert!(server.sees_line("127.0.0.1 has reached --max-per-source"));

    held.pop();
    let refusals = 1 + server.refusals_until_room(0);
    let record = server.stop();
    assert_eq!(record.refused_by.get("max_per_source"), Some(&refusals));
    assert_eq!(record.accepted, 5);
}

#[test]
fn without_memory_above_the_reserve_peers_are_refused() {
    let mut server = Server::start(2, &["--memory-reserve", "99%"]);
    assert!(server.sees_line("memory: "));
    for offset in [0, 1, 0] {
        assert!(server.refuses(offset));
    }
    assert!(server.sees_line("| refusing"));
    let record = server.stop();
    assert_eq!(record.refused_by.get("memory"), Some(&3));
    assert_eq!(record.accepted, 0);
    let guard = record.memory_guard.unwrap();
    assert!(guard.closed && guard.closings == 1, "{guard:?}");
    assert!(guard.room_bytes < guard.reserve_bytes, "{guard:?}");
}

#[test]
fn with_overload_pause_peers_wait_in_a_short_backlog() {
    let mut server = Server::start(1, &["--memory-reserve", "99%", "--overload", "pause"]);
    assert!(server.sees_line("| pausing"));
    let waiting = server.connect(0);
    (&waiting).write_all(b"is anybody there?").unwrap();
    waiting.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let answer = std::io::Read::read(&mut &waiting, &mut [0; 1]);
    assert_eq!(answer.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    let crowd = (0..8).filter_map(|_| {
        TcpStream::connect_timeout(&server.address(0), Duration::from_millis(200)).ok()
    });
    assert!(crowd.count() < 4, "the backlog has not shrunk");
    let record = server.stop();
    assert_eq!((record.accepted, record.refused), (0, 0));
}

#[test]
fn the_series_begins_before_the_first_connection_and_shows_a_burst() {
    let server = Server::start(1, &[]);
    let crowd: Vec<_> = (0..300).map(|_| server.connect(0)).collect();
    echo_all(&crowd, b"all here");
    drop(crowd);
    let record = server.stop();
    let first = &record.series[0];
    assert_eq!((first.seconds, first.open), (0.0, 0), "{:?}", record.series);
    let is_of_the_ramp = |open: u64| (1..record.peak).contains(&open);
    let seen = record.series.iter().filter(|point| is_of_the_ramp(point.open)).count();
    assert!(seen > 0 && record.peak == 300, "{:?}", record.series);
}
