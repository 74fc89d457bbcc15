//! No descriptor leaks, whatever way a connection, a listener, a watch or a reactor ends.
//!
//! Each test of each binary checks that it leaks no descriptor. This file contains all ways to end, and checks that no
//! test omits the check. (The simulation among the unit tests checks for leaks when calls fail.)

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::fs;
use std::io::Write;
use std::net::UdpSocket;
use std::path::Path;
use std::time::Duration;

use common::descriptors::Descriptors;
use common::{Conn, DEADLINE, Event, Why, World, closed_port, peer, reset};
use reactor::{ConnectOptions, FileTable, Interest};

fn accepted_and_closed(world: &mut World) {
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    world.cx().close(token);
    assert_eq!(world.until_closed(token), Why::Closed);
}

fn aborted(world: &mut World) {
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    world.cx().abort(token);
    assert_eq!(world.until_closed(token), Why::Aborted);
}

fn reset_by_its_peer(world: &mut World) {
    let address = world.listen();
    let (peer, token) = world.pair(address);
    reset(peer);
    assert!(matches!(world.until_closed(token), Why::Failed(_)));
}

fn refused_in_on_accept(world: &mut World) {
    let address = world.listen();
    world.service.refusing = true;
    let _peer = peer(address);
    world.until("the refusal", |world| world.cx().stats().refused == 1);
}

fn connected_to_a_closed_port(world: &mut World) {
    let (_bound, address) = closed_port([127, 0, 0, 1].into());
    let token = world.cx().connect(address, &ConnectOptions::default(), Conn::Connecting).unwrap();
    assert!(matches!(world.until_closed(token), Why::ConnectFailed(_)));
}

fn connected_from_an_impossible_source(world: &mut World) {
    let source = Some(([192, 0, 2, 1], 0).into());
    let options = ConnectOptions { source, ..ConnectOptions::default() };
    world.cx().connect(([127, 0, 0, 1], 9), &options, Conn::Connecting).unwrap_err();
}

fn dropped_with_unread_and_unsent_bytes(world: &mut World) {
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    world.cx().pause_reads(token);
    peer.write_all(b"nobody reads this").unwrap();
    world.until("a full socket", |world| {
        world.cx().write(token, &[7; 64 * 1024]).is_err() || world.cx().queued_bytes(token) > 0
    });
}

fn unlistened_with_a_peer_in_the_backlog(world: &mut World) {
    let (listener, address) = world.listener();
    world.cx().pause_accepts(listener).unwrap();
    let _peer = peer(address);
    world.cx().unlisten(listener);
}

fn watched_and_given_back(world: &mut World) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let watch = world.cx().watch(socket, Interest::Readable).unwrap();
    assert!(world.cx().unwatch(watch).is_some());
}

fn watched_to_the_end(world: &mut World) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    world.cx().watch(socket, Interest::Readable).unwrap();
}

fn shut_down(world: &mut World) {
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    world.cx().shutdown(DEADLINE);
    assert_eq!(world.until_closed(token), Why::Closed);
}

fn closed_in_on_open(world: &mut World) {
    let address = world.listen();
    world.script(|cx, event| {
        if let Event::Open(token) = event {
            cx.close(*token);
        }
    });
    let (_peer, token) = world.pair(address);
    assert_eq!(world.until_closed(token), Why::Closed);
}

#[test]
fn no_descriptor_leaks_whatever_way_it_ends() {
    let descriptors = Descriptors::counted();
    type Ending = (&'static str, fn(&mut World));
    let endings: [Ending; 12] = [
        ("accepted and closed", accepted_and_closed),
        ("aborted", aborted),
        ("reset by its peer", reset_by_its_peer),
        ("refused in on_accept", refused_in_on_accept),
        ("connected to a closed port", connected_to_a_closed_port),
        ("connected from an impossible source", connected_from_an_impossible_source),
        ("dropped with unread and unsent bytes", dropped_with_unread_and_unsent_bytes),
        ("unlistened with a peer in the backlog", unlistened_with_a_peer_in_the_backlog),
        ("watched and given back", watched_and_given_back),
        ("watched to the end", watched_to_the_end),
        ("shut down", shut_down),
        ("closed in on_open", closed_in_on_open),
    ];
    for (name, ending) in endings {
        println!("{name}");
        let mut world = World::new();
        ending(&mut world);
        let _ = world.turn(Duration::ZERO);
        drop(world);
        descriptors.check();
    }
}

#[test]
fn a_descriptor_that_stays_open_is_found() {
    let descriptors = Descriptors::counted();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    assert_eq!(descriptors.more().len(), 1);
    drop(socket);
    assert!(descriptors.more().is_empty());
}

#[test]
fn every_test_counts_the_descriptors_that_are_open() {
    let _descriptors = Descriptors::counted();
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut seen = 0;
    for file in fs::read_dir(tests).unwrap().map(|entry| entry.unwrap().path()) {
        if file.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let source = fs::read_to_string(&file).unwrap();
        for test in source.split("\n#[test]\n").skip(1) {
            let body = test.split_once("{\n").unwrap().1;
            seen += 1;
            let first = body.lines().next().unwrap();
            let counts =
                first.trim_start().starts_with("let") && first.ends_with("Descriptors::counted();");
            assert!(counts, "{}: {}", file.display(), test.lines().next().unwrap());
        }
    }
    assert!(seen > 100, "only {seen} tests were found");
}

#[test]
#[ignore = "fails where there is no io_uring, which is how `scripts/check` asks"]
fn registered_files_can_be_had() {
    let _descriptors = Descriptors::counted();
    FileTable::check_registered().unwrap();
}
