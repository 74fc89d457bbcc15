//! Hostile packets: the bytes of a fuzzer as packets of the device.

use std::time::{Duration, Instant};

use super::segment::{Flags, Segment};
use super::tcp::{Link, Stage, Tcp};
use super::tuple::Tuples;
use crate::protocols::Echo;

const COUNT: u32 = 16;
const TIMEOUT: Duration = Duration::from_secs(2);
const STEP: Duration = Duration::from_millis(70);

/// Discards what is sent.
#[derive(Debug)]
struct Nowhere;

impl Link for Nowhere {
    fn send(&mut self, packet: &[u8]) {
        assert!(Segment::parse(packet).is_some(), "a segment that is sent is whole");
    }
}

/// Plays bytes: each piece is a raw packet, or a segment of the server with sequence numbers near the expected ones.
#[cfg_attr(not(fuzzing), expect(unreachable_pub, reason = "the fuzz target is another crate"))]
pub fn play_packets(bytes: &[u8]) {
    let (Ok(prefix), Ok(server)) = ("198.18.0.0/24".parse(), "198.18.0.1:9900".parse()) else {
        return;
    };
    let tuples = Tuples::new(prefix, server, 3);
    let mut bytes = bytes.iter().copied();
    let verify = bytes.next().is_some_and(|byte| byte & 1 == 1);
    let mut tcp = Tcp::new(Echo, tuples, Nowhere, COUNT, TIMEOUT, verify);
    let (mut now, mut packet) = (Instant::now(), Vec::new());
    (0..COUNT / 2).for_each(|index| tcp.open(index, now));
    for turn in 0.. {
        if next_packet(&mut bytes, &tuples, &tcp, &mut packet).is_none() {
            return;
        }
        now += STEP;
        let _ = tcp.on_packet(&packet, now);
        while tcp.expire(now).is_some() {}
        let index = turn % COUNT;
        match (tcp.stage(index), turn % 3) {
            (Stage::Up, _) => tcp.ask(index, now, now),
            (Stage::Closed, 0) => tcp.open(index, now),
            (Stage::Closed, 1) => tcp.confirm(index, now),
            (Stage::Asked, 1) => tcp.reset(index),
            _ => {}
        }
        assert!(tcp.waiting() <= COUNT as usize);
    }
}

fn next_packet(
    bytes: &mut impl Iterator<Item = u8>,
    tuples: &Tuples,
    tcp: &Tcp<Echo, Nowhere>,
    packet: &mut Vec<u8>,
) -> Option<()> {
    let kind = bytes.next()?;
    let length = usize::from(bytes.next()? % 64);
    if kind % 16 == 0 {
        packet.clear();
        packet.extend(bytes.take(length));
        return Some(());
    }
    let index = u32::from(bytes.next()?) % (COUNT + 2);
    let mut near = || Some(i32::from(bytes.next()?.cast_signed()) / 2);
    let (sequence, acknowledgment) = (near()?, near()?);
    let (client, server) = tuples.of(index);
    let (receive_next, first) = tcp.numbers(index);
    let text = format!("Hello Server, connections num:{}, and more", index + 1);
    let segment = Segment {
        source: server,
        destination: client,
        sequence: receive_next.wrapping_add_signed(sequence),
        acknowledgment: (kind & 0x80 != 0).then_some(first.wrapping_add_signed(acknowledgment)),
        flags: Flags { syn: kind & 1 != 0, fin: kind & 2 != 0, rst: kind & 4 != 0 },
        payload: &text.as_bytes()[..length.min(text.len())],
    };
    segment.write(packet);
    Some(())
}
