//! Writing: directly, through the queue, up to its bounds; and the ways to end: `finish`, `close`, `abort`.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use allocation_counter::measure;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use reactor::{
    Chunk, Config, ConnectOptions, Error, ListenOptions, SharedPart, Token, WriteError, Written,
};

use common::descriptors::Descriptors;
use common::{
    Conn, DEADLINE, Event, Why, World, echo, echo_once, pattern, peer, read_to_end, reset,
};

/// Small bounds, so that a queue fills up quickly.
fn bounded() -> Config {
    Config { write_queue_bytes_max: 100_000, write_queues_bytes_max: 250_000, ..Default::default() }
}

/// Writes until the kernel accepts no more and bytes are queued; returns the number of written bytes.
fn fill_kernel(world: &mut World, token: Token, stream: &[u8]) -> usize {
    let mut written = 0;
    for piece in stream.chunks(50_000) {
        let answer = world.cx().write(token, piece).unwrap();
        written += piece.len();
        if answer == Written::Queued {
            assert!(world.cx().queued_bytes(token) > 0);
            return written;
        }
        assert_eq!(world.cx().queued_bytes(token), 0);
    }
    panic!("the kernel has accepted {written} bytes");
}

/// Reads in this thread, with turns of the world in between, until `expected` bytes have arrived.
fn drain(world: &mut World, peer: &mut TcpStream, expected: usize) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = vec![0; 1 << 18];
    peer.set_nonblocking(true).unwrap();
    world.until("the drain", |_| {
        match peer.read(&mut buffer) {
            Ok(read) => all.extend_from_slice(&buffer[..read]),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        all.len() >= expected
    });
    peer.set_nonblocking(false).unwrap();
    all
}

#[test]
fn unacknowledged_bytes_are_reported() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(bounded());
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    assert_eq!(world.cx().unacknowledged_bytes(token), 0);
    let written = fill_kernel(&mut world, token, &pattern(64 << 20));
    assert!(world.cx().unacknowledged_bytes(token) > 0);
    drain(&mut world, &mut peer, written);
    world.until("the last acknowledgement", |world| world.cx().unacknowledged_bytes(token) == 0);
    world.cx().abort(token);
    world.until("the end", |world| !world.cx().holds(token));
    assert_eq!(world.cx().unacknowledged_bytes(token), 0, "a stale token");
}

/// Returns how many bytes of a stream the kernel buffers if the peer does not read, for an accepted and for an outbound
/// connection; then the peer reads all of it.
fn held_by_the_kernel(listening: &ListenOptions, connecting: &ConnectOptions) -> [usize; 2] {
    let mut world = World::with(bounded());
    let listener = world.cx().listen(common::LOOPBACK, listening).unwrap();
    let address = world.cx().listener_addr(listener).unwrap();
    let accepted = world.pair(address);
    let outside = TcpListener::bind(common::LOOPBACK).unwrap();
    let address = outside.local_addr().unwrap();
    let token = world.cx().connect(address, connecting, Conn::Connecting).unwrap();
    world.until("the connect", |world| world.service.opened().contains(&token));
    let connected = (outside.accept().unwrap().0, token);
    [accepted, connected].map(|(mut peer, token)| {
        let stream = pattern(8 << 20);
        let mut written = 0;
        for piece in stream.chunks(10_000) {
            if world.cx().write(token, piece).is_err() {
                break;
            }
            written += piece.len();
            let _ = world.turn(Duration::from_millis(1));
        }
        assert!(world.cx().queued_bytes(token) > 0, "the kernel has accepted {written} bytes");
        let held = world.cx().unacknowledged_bytes(token);
        let arrived = drain(&mut world, &mut peer, written);
        assert!(arrived == stream[..written], "bytes are lost or out of order");
        held
    })
}

/// The limit that the options below set.
const BOUND: usize = 16 * 1024;

#[test]
fn options_limit_the_bytes_in_the_kernel_for_a_peer_that_never_reads() {
    let _descriptors = Descriptors::counted();
    let usual = held_by_the_kernel(&ListenOptions::default(), &ConnectOptions::default());
    let by_buffer = held_by_the_kernel(
        &ListenOptions { send_buffer_bytes: Some(BOUND), ..Default::default() },
        &ConnectOptions { send_buffer_bytes: Some(BOUND), ..Default::default() },
    );
    let lowat = Some(BOUND as u32);
    let by_lowat = held_by_the_kernel(
        &ListenOptions { notsent_lowat_bytes: lowat, ..Default::default() },
        &ConnectOptions { notsent_lowat_bytes: lowat, ..Default::default() },
    );
    // The kernel accepts whole segments of up to 64 KiB, so the limits are not exact.
    for (&bounded, usual) in by_buffer.iter().chain(&by_lowat).zip(usual.iter().cycle()) {
        assert!(bounded < 10 * BOUND && 8 * bounded < *usual, "{bounded}, and without: {usual}");
    }
}

#[test]
fn a_full_queue_refuses_whole_writes_and_drains_in_order() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(bounded());
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    let stream = pattern(16 << 20);
    let mut written = fill_kernel(&mut world, token, &stream);
    let room = 100_000 - world.cx().queued_bytes(token);
    // A write that is one byte too long is refused as a whole; one that fits exactly is accepted.
    let refused = world.cx().write(token, &stream[written..written + room + 1]);
    assert_eq!(refused, Err(WriteError::Full));
    assert_eq!(world.cx().queued_bytes(token), 100_000 - room);
    let slices = [IoSlice::new(&stream[..room]), IoSlice::new(b"!")];
    assert_eq!(world.cx().write_vectored(token, &slices), Err(WriteError::Full));
    let chunk = Chunk::Owned(stream[..=room].to_vec());
    assert_eq!(world.cx().write_chunk(token, chunk), Err(WriteError::Full));
    assert_eq!(world.cx().write(token, &stream[written..written + room]), Ok(Written::Queued));
    written += room;
    assert_eq!(world.cx().write(token, b"x"), Err(WriteError::Full));
    assert_eq!(world.cx().stats().queued_bytes, 100_000);

    assert_eq!(drain(&mut world, &mut peer, written), stream[..written]);
    world.until("on_drain", |world| world.service.saw(&Event::Drain(token)));
    assert_eq!(world.cx().stats().bytes_out, written as u64);
    assert_eq!(world.cx().stats().queued_bytes, 0);
    // After that, writes are sent directly again.
    assert_eq!(world.cx().write(token, b"again"), Ok(Written::Sent));
    assert_eq!(drain(&mut world, &mut peer, 5), b"again");
    world.run_for(Duration::from_millis(10));
    assert_eq!(world.service.count(|event| matches!(event, Event::Drain(_))), 1);
}

#[test]
fn a_refused_write_sends_no_byte_even_if_the_kernel_has_room() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(bounded());
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    assert_eq!(world.cx().write(token, &[1; 100_001]), Err(WriteError::Full));
    assert_eq!(world.cx().write(token, b"only this"), Ok(Written::Sent));
    world.cx().close(token);
    world.until_closed(token);
    assert_eq!(read_to_end(&mut peer), (b"only this".to_vec(), false));
}

#[test]
fn write_room_is_what_a_write_accepts() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(bounded());
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    let stream = pattern(16 << 20);
    assert_eq!(world.cx().write_room(token), 100_000);
    fill_kernel(&mut world, token, &stream);
    let room = world.cx().write_room(token);
    assert_eq!(room, 100_000 - world.cx().queued_bytes(token));
    assert_eq!(world.cx().write(token, &vec![0; room + 1]), Err(WriteError::Full));
    assert_eq!(world.cx().write(token, &vec![0; room]), Ok(Written::Queued));
    assert_eq!(world.cx().write_room(token), 0);

    // All queues together have 250,000 bytes.
    let mut others = Vec::new();
    for bound in [100_000, 50_000] {
        let (peer, other) = world.pair(address);
        others.push(peer);
        assert_eq!(world.cx().write_room(other), bound);
        fill_kernel(&mut world, other, &stream);
        let left = world.cx().write_room(other);
        assert_eq!(world.cx().write(other, &vec![0; left]), Ok(Written::Queued));
    }
    world.cx().abort(token);
    assert_eq!(world.cx().write_room(token), 0);
}

#[test]
fn all_queues_together_have_a_bound() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(bounded());
    let address = world.listen();
    let stream = pattern(16 << 20);
    let pairs: Vec<_> = (0..3).map(|_| world.pair(address)).collect();
    for (_, token) in &pairs[..2] {
        fill_kernel(&mut world, *token, &stream);
        let room = 100_000 - world.cx().queued_bytes(*token);
        world.cx().write(*token, &stream[..room]).unwrap();
    }
    let (_, last) = pairs[2];
    // A peer that reads is not affected by those that do not.
    assert_eq!(world.cx().write(last, &[0; 50_001]), Ok(Written::Sent));
    // A peer that does not read gets no more than what is left.
    let refused = fill_until_refused(&mut world, last);
    assert!(matches!(refused, WriteError::FullInTotal | WriteError::Closed), "{refused:?}");
    assert!(world.cx().stats().queued_bytes <= 250_000);
    // A connection that is removed frees its part.
    world.cx().abort(pairs[0].1);
    world.cx().abort(last);
    world.until_closed(pairs[0].1);
    assert_eq!(world.cx().stats().queued_bytes, 100_000);
}

/// The service writes while there is room for a piece, and continues in `on_drain`.
#[test]
fn on_drain_follows_a_write_room_that_was_too_small() {
    let _descriptors = Descriptors::counted();
    const TOTAL: usize = 1 << 20;
    let mut world = World::with(bounded());
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    let mut left = TOTAL;
    world.script(move |cx, event| {
        if matches!(event, Event::Data(..) | Event::Drain(_)) {
            while left > 0 && cx.write_room(token) >= 90_000 {
                let piece = left.min(1000);
                cx.write(token, &[7; 1000][..piece]).unwrap();
                left -= piece;
            }
        }
    });
    peer.write_all(b"!").unwrap();
    assert_eq!(drain(&mut world, &mut peer, TOTAL), [7; TOTAL]);
}

#[test]
fn on_drain_follows_when_all_queues_together_have_room_again() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(bounded());
    let address = world.listen();
    let stream = pattern(16 << 20);
    let pairs: Vec<_> = (0..4).map(|_| world.pair(address)).collect();
    for (_, token) in &pairs[..3] {
        fill_kernel(&mut world, *token, &stream);
        let room = world.cx().write_room(*token);
        world.cx().write(*token, &stream[..room]).unwrap();
    }
    let (_, healthy) = pairs[3];
    assert_eq!((world.cx().write_room(healthy), world.cx().queued_bytes(healthy)), (0, 0));
    world.run_for(Duration::from_millis(20));
    let drains = |world: &World| world.service.count(|event| *event == Event::Drain(healthy));
    assert_eq!(drains(&world), 0);
    world.cx().abort(pairs[0].1);
    world.until("the call", |world| drains(world) == 1);
    assert_eq!(world.cx().write_room(healthy), 100_000);
    // Once for each time that there was no room.
    world.run_for(Duration::from_millis(20));
    assert_eq!(drains(&world), 1);
}

/// Writes until a write is refused; returns the error.
fn fill_until_refused(world: &mut World, token: Token) -> WriteError {
    for _ in 0..10_000 {
        if let Err(refused) = world.cx().write(token, &[0; 60_000]) {
            return refused;
        }
    }
    panic!("600 MB were accepted");
}

#[test]
fn closing_delivers_the_bytes_in_the_kernel_in_spite_of_unread_input() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    // If a socket with unread input is closed, TCP resets the connection.
    world.cx().pause_reads(token);
    peer.write_all(&[1; 1000]).unwrap();
    let stream = pattern(200_000);
    assert_eq!(world.cx().write(token, &stream), Ok(Written::Sent));
    world.cx().close(token);
    let reader = thread::spawn(move || read_to_end(&mut peer));
    assert_eq!(world.until_closed(token), Why::Closed);
    assert_eq!(reader.join().unwrap(), (stream, false));
}

#[test]
fn closing_ends_when_the_peer_has_acknowledged_everything() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { flush_timeout: 10 * DEADLINE, ..bounded() });
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    let written = fill_kernel(&mut world, token, &pattern(16 << 20));
    world.cx().close(token);
    world.run_for(Duration::from_millis(120));
    assert_eq!(world.service.why(token), None, "the peer has not taken all");
    assert_eq!(drain(&mut world, &mut peer, written).len(), written);
    assert_eq!(world.until_closed(token), Why::Closed);
}

/// Waits until the kernel has an error for the socket, which the reactor has not read yet.
fn await_error(world: &mut World, token: Token) {
    let fd = world.cx().connection_fd(token).unwrap();
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::empty())];
    assert_eq!(poll(&mut fds, PollTimeout::try_from(DEADLINE).unwrap()), Ok(1));
    assert!(fds[0].revents().unwrap().contains(PollFlags::POLLERR));
}

#[test]
fn closing_after_a_reset_reports_the_socket_error() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (peer, token) = world.pair(address);
    world.cx().pause_reads(token);
    drop(peer);
    // The peer answers the first write with a reset.
    assert_eq!(world.cx().write(token, b"late"), Ok(Written::Sent));
    await_error(&mut world, token);
    world.cx().close(token);
    let why = world.until_closed(token);
    let is_true = [Errno::EPIPE, Errno::ECONNRESET].map(|errno| Why::Failed(errno as i32));
    assert!(is_true.contains(&why), "{why:?}");
}

#[test]
fn the_three_ways_to_write_send_the_same() {
    let _descriptors = Descriptors::counted();
    let stream = pattern(8 << 20);
    let mut world = World::with(Config { write_queue_bytes_max: 16 << 20, ..Default::default() });
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    let mut rest = &stream[..];
    let mut turn = 0;
    let shared: Arc<[u8]> = stream[..0].into();
    assert_eq!(world.cx().write_chunk(token, shared), Ok(Written::Sent));
    while !rest.is_empty() {
        // Odd sizes, and more slices than one send accepts.
        let (piece, left) = rest.split_at(rest.len().min(40_009 + turn));
        rest = left;
        turn += 1;
        let answer = match turn % 4 {
            0 => world.cx().write(token, piece),
            1 => {
                let slices: Vec<_> = piece.chunks(997).map(IoSlice::new).collect();
                assert!(slices.len() > 16);
                world.cx().write_vectored(token, &slices)
            }
            2 => world.cx().write_chunk(token, piece.to_vec()),
            _ => world.cx().write_chunk(token, Arc::<[u8]>::from(piece)),
        };
        assert!(answer.is_ok());
    }
    assert!(world.cx().queued_bytes(token) > 0, "nothing was queued");
    assert!(drain(&mut world, &mut peer, stream.len()) == stream);
    world.until("on_drain", |world| world.service.saw(&Event::Drain(token)));
}

/// Each part reaches the peer completely if it is queued.
#[test]
fn parts_of_shared_bytes_are_queued_without_a_copy() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(bounded());
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    let stream = pattern(16 << 20);
    let written = fill_kernel(&mut world, token, &stream);
    // Long enough not to be copied behind others.
    let text = [b"left, ", "middle".repeat(50).as_bytes(), b", right"].concat();
    let (shared, middle) = (Arc::<[u8]>::from(&text[..]), &text[6..306]);
    let part = SharedPart::new(Arc::clone(&shared), 6..306).unwrap();
    assert_eq!(Chunk::from(part.clone()).as_bytes(), middle);
    assert_eq!(world.cx().write_chunk(token, part), Ok(Written::Queued));
    assert_eq!(Arc::strong_count(&shared), 2, "the queue does not share the allocation");
    let nothing = SharedPart::new(Arc::clone(&shared), 313..313).unwrap();
    assert!(world.cx().write_chunk(token, nothing).is_ok());
    for outside in [0..314, 314..314, usize::MAX..usize::MAX] {
        assert!(SharedPart::new(Arc::clone(&shared), outside).is_none());
    }
    #[cfg(feature = "bytes")]
    world.cx().write_chunk(token, bytes::Bytes::from_static(b"middle").slice(..3)).unwrap();
    let tail = [middle, if cfg!(feature = "bytes") { b"mid" } else { b"" }].concat();
    let all = drain(&mut world, &mut peer, written + tail.len());
    assert!(all == [&stream[..written], &tail].concat());
    assert_eq!(Arc::strong_count(&shared), 1);
}

#[test]
fn few_vectored_slices_are_sent_directly() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    let slices = [IoSlice::new(b"one "), IoSlice::new(b""), IoSlice::new(b"two")];
    assert_eq!(world.cx().write_vectored(token, &slices), Ok(Written::Sent));
    assert_eq!(world.cx().write_vectored(token, &[]), Ok(Written::Sent));
    assert_eq!(drain(&mut world, &mut peer, 7), b"one two");
}

#[test]
fn bytes_written_during_a_connect_are_sent_when_it_opens() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let options = ConnectOptions::default();
    let token = world.cx().connect(address, &options, Conn::Connecting).unwrap();
    assert_eq!(world.cx().write(token, b"first, "), Ok(Written::Queued));
    assert_eq!(world.cx().write(token, b"then this"), Ok(Written::Queued));
    world.until("the bytes", |world| {
        let accepted = world.service.opened().into_iter().find(|&other| other != token);
        accepted.is_some_and(|accepted| world.service.data(accepted) == b"first, then this")
    });
    let drained = world.service.log.iter().position(|event| *event == Event::Drain(token));
    let opened = world.service.log.iter().position(|event| *event == Event::Open(token));
    assert!(opened < drained, "on_open comes before on_drain");
}

#[test]
fn closing_a_pending_connect_still_sends_queued_bytes() {
    let _descriptors = Descriptors::counted();
    let listener = std::net::TcpListener::bind(common::LOOPBACK).unwrap();
    let mut world = World::new();
    let options = ConnectOptions::default();
    let address = listener.local_addr().unwrap();
    let token = world.cx().connect(address, &options, Conn::Connecting).unwrap();
    world.cx().write(token, b"fire and forget").unwrap();
    world.cx().close(token);
    // The connection ends when the peer has closed too, so the peer runs in a thread.
    let peer = thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        peer.set_read_timeout(Some(common::DEADLINE)).unwrap();
        read_to_end(&mut peer)
    });
    assert_eq!(world.until_closed(token), Why::Closed);
    assert_eq!(peer.join().unwrap(), (b"fire and forget".to_vec(), false));
}

#[test]
fn closing_a_pending_connect_without_queued_bytes_cancels_it() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let options = ConnectOptions::default();
    let token = world.cx().connect(address, &options, Conn::Connecting).unwrap();
    world.cx().close(token);
    assert_eq!(world.until_closed(token), Why::Closed);
    assert!(!world.service.saw(&Event::Open(token)));
}

#[test]
fn finishing_a_pending_connect_sends_the_fin() {
    let _descriptors = Descriptors::counted();
    for message in [&b""[..], b"request"] {
        let listener = std::net::TcpListener::bind(common::LOOPBACK).unwrap();
        let mut world = World::new();
        let options = ConnectOptions::default();
        let address = listener.local_addr().unwrap();
        let token = world.cx().connect(address, &options, Conn::Connecting).unwrap();
        world.cx().write(token, message).unwrap();
        world.cx().finish(token);
        world.until("the open", |world| world.service.saw(&Event::Open(token)));
        let (mut peer, _) = listener.accept().unwrap();
        peer.set_nonblocking(true).unwrap();
        let mut received = Vec::new();
        world.until("the FIN", |_| peer.read_to_end(&mut received).is_ok());
        assert_eq!(received, message);
        peer.set_nonblocking(false).unwrap();
        peer.write_all(b"answer").unwrap();
        drop(peer);
        assert_eq!(world.until_closed(token), Why::Finished);
        assert_eq!(world.service.data(token), b"answer");
    }
}

#[test]
fn close_sends_the_queue_first() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(bounded());
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    let stream = pattern(16 << 20);
    let written = fill_kernel(&mut world, token, &stream);
    world.cx().close(token);
    world.cx().close(token);
    assert_eq!(world.cx().write(token, b"late"), Err(WriteError::Closed));
    world.run_for(Duration::from_millis(20));
    assert!(world.cx().holds(token), "the connection ended before the peer has read");
    let reader = std::thread::spawn(move || read_to_end(&mut peer));
    assert_eq!(world.until_closed(token), Why::Closed);
    let (bytes, by_reset) = reader.join().unwrap();
    assert!(bytes == stream[..written] && !by_reset);
    assert!(!world.service.saw(&Event::Drain(token)), "on_drain after a close");
}

#[test]
fn close_times_out_if_the_peer_does_not_read() {
    let _descriptors = Descriptors::counted();
    let flush_timeout = Duration::from_millis(80);
    let mut world = World::with(Config { flush_timeout, ..bounded() });
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    fill_kernel(&mut world, token, &pattern(16 << 20));
    // A timeout of the service has no effect, and can't be moved or cleared any more.
    world.cx().set_timeout(token, Duration::from_millis(1));
    let before = Instant::now();
    world.cx().close(token);
    world.cx().clear_timeout(token);
    world.cx().set_timeout(token, Duration::from_secs(3600));
    assert_eq!(world.until_closed(token), Why::FlushTimedOut);
    assert!(before.elapsed() >= flush_timeout);
    assert!(read_to_end(&mut peer).1);
    assert_eq!(world.service.count(|event| matches!(event, Event::Timeout(_))), 0);
}

#[test]
fn abort_resets_and_drops_the_queue() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(bounded());
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    let written = fill_kernel(&mut world, token, &pattern(16 << 20));
    world.cx().abort(token);
    assert_eq!(world.until_closed(token), Why::Aborted);
    let (bytes, by_reset) = read_to_end(&mut peer);
    assert!(by_reset && bytes.len() < written);
}

#[test]
fn a_peer_that_resets_while_bytes_are_queued_ends_the_connection() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(bounded());
    let address = world.listen();
    let (peer, token) = world.pair(address);
    fill_kernel(&mut world, token, &pattern(16 << 20));
    reset(peer);
    assert_eq!(world.until_closed(token), Why::Failed(nix::libc::ECONNRESET));
}

#[test]
fn a_write_that_fails_is_followed_by_on_close() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (peer, token) = world.pair(address);
    world.cx().pause_reads(token);
    reset(peer);
    let answer = world.cx().write(token, b"anybody there?");
    assert_eq!(answer, Err(WriteError::Closed));
    assert!(matches!(world.until_closed(token), Why::Failed(_)));
}

#[test]
fn half_close_works_from_this_side_first() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    world.cx().write(token, b"that is all").unwrap();
    world.cx().finish(token);
    world.cx().finish(token);
    assert_eq!(world.cx().write(token, b"more"), Err(WriteError::Closed));
    assert_eq!(read_to_end(&mut peer), (b"that is all".to_vec(), false));
    peer.write_all(b"I go on").unwrap();
    world.until("the data", |world| world.service.data(token) == b"I go on");
    peer.shutdown(Shutdown::Write).unwrap();
    assert_eq!(world.until_closed(token), Why::Finished);
    assert!(world.service.saw(&Event::Eof(token)), "no on_eof before the end");
}

#[test]
fn half_close_works_from_the_peers_side_first() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    peer.write_all(b"request").unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    world.until("the end of it", |world| world.service.saw(&Event::Eof(token)));
    assert_eq!(world.cx().write(token, b"answer"), Ok(Written::Sent));
    world.cx().resume_reads(token);
    world.run_for(Duration::from_millis(10));
    assert_eq!(world.service.count(|event| matches!(event, Event::Eof(_))), 1);
    world.cx().finish(token);
    assert_eq!(world.until_closed(token), Why::Finished);
    assert_eq!(read_to_end(&mut peer), (b"answer".to_vec(), false));
}

#[test]
fn finish_waits_for_the_queue() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(bounded());
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    let stream = pattern(16 << 20);
    let written = fill_kernel(&mut world, token, &stream);
    world.cx().finish(token);
    let reader = std::thread::spawn(move || {
        let found = read_to_end(&mut peer);
        drop(peer);
        found
    });
    assert_eq!(world.until_closed(token), Why::Finished);
    let (bytes, by_reset) = reader.join().unwrap();
    assert!(bytes == stream[..written] && !by_reset);
}

#[test]
fn paused_reads_leave_the_bytes_in_the_kernel_without_wake_ups() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    world.cx().pause_reads(token);
    peer.write_all(b"wait for it").unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    let wakeups = world.run_for(Duration::from_millis(200));
    assert!(wakeups <= 2, "{wakeups} wake-ups while nothing was wanted");
    assert_eq!(world.service.data(token), b"");
    world.cx().resume_reads(token);
    world.until("the end", |world| world.service.saw(&Event::Eof(token)));
    assert_eq!(world.service.data(token), b"wait for it");
}

#[test]
fn reads_paused_within_on_open_get_no_data() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.script(|cx, event| {
        if let Event::Open(token) = event {
            cx.pause_reads(*token);
        }
    });
    let address = world.listen();
    let mut peer = peer(address);
    peer.write_all(b"early").unwrap();
    world.until("the open", |world| !world.service.opened().is_empty());
    let token = world.service.opened()[0];
    world.run_for(Duration::from_millis(20));
    assert_eq!(world.service.data(token), b"");
    world.cx().resume_reads(token);
    world.until("the data", |world| world.service.data(token) == b"early");
}

#[test]
fn a_reset_while_reads_are_paused_ends_the_connection_and_does_not_spin() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    world.cx().pause_reads(token);
    peer.write_all(b"never read").unwrap();
    world.run_for(Duration::from_millis(10));
    reset(peer);
    assert_eq!(world.until_closed(token), Why::Failed(nix::libc::ECONNRESET));
}

#[test]
fn a_hang_up_while_reads_are_paused_does_not_spin_and_is_reported_later() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    world.cx().pause_reads(token);
    world.cx().finish(token);
    peer.write_all(b"kept").unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    // Both sides have finished: EPOLLHUP, which is always reported.
    let wakeups = world.run_for(Duration::from_millis(200));
    assert!(wakeups <= 4, "{wakeups} wake-ups while nothing was wanted");
    assert!(world.cx().holds(token), "the connection ended before its data was read");
    world.cx().resume_reads(token);
    assert_eq!(world.until_closed(token), Why::Finished);
    assert_eq!(world.service.data(token), b"kept");
    assert!(world.service.saw(&Event::Eof(token)));
}

#[test]
fn echo_with_back_pressure_passes_a_stream_far_larger_than_the_bounds() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(bounded());
    world.script(|cx, event| match *event {
        Event::Data(token, ref bytes) => {
            let answer = cx.write(token, bytes).unwrap();
            if answer == Written::Queued {
                cx.pause_reads(token);
            }
        }
        Event::Drain(token) => cx.resume_reads(token),
        Event::Eof(token) => cx.close(token),
        _ => {}
    });
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    let stream = Arc::new(pattern(16 << 20));
    let mut sender = peer.try_clone().unwrap();
    let sent = stream.clone();
    let sending = std::thread::spawn(move || {
        sender.write_all(&sent).unwrap();
        sender.shutdown(Shutdown::Write).unwrap();
    });
    // The peer reads nothing until the reactor has stopped reading as well.
    world.until("the back-pressure", |world| world.cx().queued_bytes(token) > 0);
    let reading = std::thread::spawn(move || read_to_end(&mut peer));
    assert_eq!(world.until_closed(token), Why::PeerClosed);
    sending.join().unwrap();
    let (bytes, by_reset) = reading.join().unwrap();
    assert!(bytes == *stream && !by_reset);
    let stats = world.cx().stats();
    assert_eq!((stats.bytes_in, stats.bytes_out), (16 << 20, 16 << 20));
    assert!(world.service.saw(&Event::Drain(token)), "there was no back-pressure to test");
}

#[test]
fn a_slow_reader_does_not_slow_others_down() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(bounded());
    let address = world.listen();
    let (_slow, slow_token) = world.pair(address);
    fill_kernel(&mut world, slow_token, &pattern(16 << 20));
    world.script(echo);
    let (mut quick, _) = world.pair(address);
    for _ in 0..100 {
        echo_once(&mut world, &mut quick, b"quick");
    }
    let wakeups = world.run_for(Duration::from_millis(100));
    assert!(wakeups <= 2, "{wakeups} wake-ups with a full queue");
}

/// Reads slowly, with turns of the world in between, until all of these parts have arrived; returns the maximum of the
/// allocated bytes.
fn read_slowly(world: &mut World, peer: &mut TcpStream, parts: &[(&[u8], usize)]) -> u64 {
    peer.set_nonblocking(true).unwrap();
    let mut buffer = vec![0; 256 * 1024];
    let deadline = Instant::now() + DEADLINE;
    let memory = measure(|| {
        for &(part, times) in parts {
            let (mut place, end) = (0, part.len() * times);
            while place < end {
                assert!(Instant::now() < deadline, "{place} of {end} bytes arrived");
                let _ = world.turn(Duration::ZERO);
                let most = buffer.len().min(end - place);
                let read = match peer.read(&mut buffer[..most]) {
                    Ok(read) => read,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                    Err(error) => panic!("{error}"),
                };
                assert!(read > 0, "the stream ended after {place} of {end} bytes");
                let mut bytes = &buffer[..read];
                while !bytes.is_empty() {
                    let offset = place % part.len();
                    let length = bytes.len().min(part.len() - offset);
                    assert!(bytes[..length] == part[offset..][..length], "other bytes at {place}");
                    bytes = &bytes[length..];
                    place += length;
                }
            }
        }
    });
    memory.bytes_max
}

#[test]
fn a_file_of_100_mb_goes_to_a_slow_reader_in_bounded_memory() {
    let _descriptors = Descriptors::counted();
    let block = pattern(1 << 20);
    let mut file = tempfile::tempfile().unwrap();
    for _ in 0..100 {
        file.write_all(&block).unwrap();
    }
    let file = Arc::new(file);
    let mut world = World::new();
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    world.cx().write(token, b"head").unwrap();
    let length = 100 << 20;
    assert_eq!(
        world.cx().write_file(token, Arc::clone(&file), 0..length).unwrap(),
        Written::Queued
    );
    assert_eq!(world.cx().queued_bytes(token), 100 << 20);
    assert_eq!(world.cx().stats().queued_bytes, 0, "a part of the file is in memory");
    world.cx().write(token, b"middle").unwrap();
    world.cx().write_file(token, file, 1..1 << 20).unwrap();
    let parts: [(&[u8], usize); 4] =
        [(b"head", 1), (&block, 100), (b"middle", 1), (&block[1..], 1)];
    let bytes_max = read_slowly(&mut world, &mut peer, &parts);
    assert!(bytes_max < 1 << 20, "{bytes_max} bytes were allocated");
    world.until("the drain", |world| world.service.saw(&Event::Drain(token)));
    assert_eq!(world.cx().queued_bytes(token), 0);
    assert_eq!(world.cx().stats().bytes_out, (101 << 20) + 9);

    world.cx().finish(token);
    drop(peer);
    world.until_closed(token);
}

#[test]
fn a_file_without_sendfile_support_is_sent_too() {
    let _descriptors = Descriptors::counted();
    let text = std::fs::read("/proc/version").unwrap();
    let mut world = World::new();
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    let file = File::open("/proc/version").unwrap();
    world.cx().write_file(token, file, 0..text.len() as u64).unwrap();
    read_slowly(&mut world, &mut peer, &[(&text, 1)]);
}

#[test]
fn a_file_is_sent_without_a_free_descriptor_for_its_socket() {
    let _descriptors = Descriptors::counted();
    let block = pattern(1 << 20);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&block).unwrap();
    let mut world = World::new();
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 200, hard).unwrap();
    let mut all = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        all.push(file);
    }
    world.cx().write_file(token, file, 0..1 << 20).unwrap();
    read_slowly(&mut world, &mut peer, &[(&block, 1)]);
    drop(all);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    world.until("the drain", |world| world.service.saw(&Event::Drain(token)));
}

#[test]
fn queued_files_are_bounded_closed_with_their_connection_and_not_detached() {
    let _descriptors = Descriptors::counted();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[7; 100_000]).unwrap();
    let file = Arc::new(file);
    let mut world = World::new();
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    let cx = world.cx();
    assert_eq!(cx.write_file(token, Arc::clone(&file), 5..5).unwrap(), Written::Sent);
    for _ in 0..64 {
        cx.write_file(token, Arc::clone(&file), 0..100_000).unwrap();
    }
    assert_eq!(cx.write_file(token, Arc::clone(&file), 0..1), Err(WriteError::Full));
    assert!(matches!(cx.detach(token), Err(Error::Invalid(_))));
    assert_eq!(Arc::strong_count(&file), 65);
    cx.abort(token);
    world.until_closed(token);
    assert_eq!(Arc::strong_count(&file), 1);
    assert_eq!(world.cx().write_file(token, file, 0..1), Err(WriteError::Closed));
}
