//! Outbound connections: success, and each way to fail.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use nix::libc::{EADDRNOTAVAIL, ECONNREFUSED};
use reactor::{Config, ConnectOptions, Error, ListenOptions, Token};

use common::descriptors::Descriptors;
use common::{Conn, Event, LOOPBACK, Why, World, closed_port, echo};

fn connect(world: &mut World, address: SocketAddr, options: &ConnectOptions) -> Token {
    world.cx().connect(address, options, Conn::Connecting).unwrap()
}

/// A listener whose backlog is full, so that the kernel drops further SYNs: a black hole on the loopback.
fn black_hole() -> (World, SocketAddr, Vec<TcpStream>) {
    let mut hole = World::new();
    let options = ListenOptions { backlog: Some(0), ..Default::default() };
    let listener = hole.cx().listen(LOOPBACK, &options).unwrap();
    let address = hole.cx().listener_addr(listener).unwrap();
    hole.cx().pause_accepts(listener).unwrap();
    let quick = Duration::from_millis(50);
    let waiting: Vec<_> =
        std::iter::from_fn(|| TcpStream::connect_timeout(&address, quick).ok()).take(20).collect();
    assert!(waiting.len() < 20, "the backlog did not fill up");
    (hole, address, waiting)
}

#[test]
fn both_ends_of_a_connection_can_be_in_one_reactor() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let token = connect(&mut world, address, &ConnectOptions::default());
    world.until("both opens", |world| world.service.opened().len() == 2);
    let other = world.service.opened().into_iter().find(|&other| other != token).unwrap();
    world.script(move |cx, event| match event {
        Event::Data(from, _) if *from == other => echo(cx, event),
        Event::Eof(from) => cx.close(*from),
        _ => {}
    });
    world.cx().write(token, b"round trip").unwrap();
    world.until("the echo", |world| world.service.data(token) == b"round trip");
    assert_eq!(world.cx().peer_addr(token).unwrap(), address);
    assert_eq!(world.cx().conn(token), Some(&Conn::Connected));
    let stats = world.cx().stats();
    assert_eq!((stats.accepted, stats.connected, stats.open()), (1, 1, 2));
    world.cx().close(token);
    assert_eq!(world.until_closed(token), Why::Closed);
    assert_eq!(world.until_closed(other), Why::PeerClosed);
}

#[test]
fn a_closed_port_leads_only_to_on_close() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let (_held, address) = closed_port(LOOPBACK.ip());
    let token = connect(&mut world, address, &ConnectOptions::default());
    assert_eq!(world.cx().connections(), 1);
    assert_eq!(world.until_closed(token), Why::ConnectFailed(ECONNREFUSED));
    assert_eq!(world.service.log, [Event::Close(token, Why::ConnectFailed(ECONNREFUSED))]);
    let stats = world.cx().stats();
    assert_eq!((stats.connects_failed, stats.opened, stats.closed), (1, 0, 0));
    assert_eq!(world.cx().connections(), 0);
}

#[test]
fn a_closed_port_leads_only_to_on_close_also_over_ipv6() {
    let _descriptors = Descriptors::counted();
    let (_held, address) = closed_port(Ipv6Addr::LOCALHOST.into());
    let mut world = World::new();
    let token = connect(&mut world, address, &ConnectOptions::default());
    assert_eq!(world.until_closed(token), Why::ConnectFailed(ECONNREFUSED));
}

#[test]
fn a_failed_connect_drops_its_queue_and_its_timeout() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let options = ConnectOptions { timeout: Some(common::DEADLINE), ..Default::default() };
    let (_held, address) = closed_port(LOOPBACK.ip());
    let token = connect(&mut world, address, &options);
    world.cx().write(token, b"never sent").unwrap();
    assert_eq!(world.cx().stats().queued_bytes, 10);
    assert_eq!(world.cx().stats().timers_armed, 1);
    assert_eq!(world.until_closed(token), Why::ConnectFailed(ECONNREFUSED));
    assert_eq!(world.cx().stats().queued_bytes, 0);
    assert_eq!(world.cx().stats().timers_armed, 0);
}

#[test]
fn a_black_hole_times_out() {
    let _descriptors = Descriptors::counted();
    let (_hole, address, _waiting) = black_hole();
    let mut world = World::new();
    let timeout = Duration::from_millis(100);
    let before = Instant::now();
    let options = ConnectOptions { timeout: Some(timeout), ..Default::default() };
    let token = connect(&mut world, address, &options);
    assert_eq!(world.until_closed(token), Why::ConnectTimedOut);
    assert!(before.elapsed() >= timeout);
    assert_eq!(world.service.log, [Event::Close(token, Why::ConnectTimedOut)]);
    assert_eq!(world.cx().stats().connects_failed, 1);
}

#[test]
fn a_connect_can_be_cancelled() {
    let _descriptors = Descriptors::counted();
    let (_hole, address, _waiting) = black_hole();
    let mut world = World::new();
    for (end, why) in
        [(common::Cx::close as fn(&mut _, _), Why::Closed), (common::Cx::abort, Why::Aborted)]
    {
        let token = connect(&mut world, address, &ConnectOptions::default());
        end(world.cx(), token);
        assert_eq!(world.until_closed(token), why);
    }
    assert_eq!(world.service.opened(), []);
}

#[test]
fn a_timeout_of_the_connect_is_cancelled_when_it_opens() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let timeout = Duration::from_secs(2);
    let options = ConnectOptions { timeout: Some(timeout), ..Default::default() };
    let token = connect(&mut world, address, &options);
    world.until("the open", |world| world.service.saw(&Event::Open(token)));
    assert_eq!(world.cx().stats().timers_armed, 0);
}

#[test]
fn a_source_that_is_not_of_this_machine_is_an_error_at_once() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    // 192.0.2.0/24 is reserved for documentation.
    let foreign = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 0);
    let options = ConnectOptions { source: Some(foreign), ..Default::default() };
    let error = world.cx().connect(address, &options, Conn::Connecting).unwrap_err().error;
    assert_eq!(error.errno(), Some(EADDRNOTAVAIL), "{error}");
    assert!(error.to_string().starts_with("bind: "), "{error}");
    world.run_for(Duration::from_millis(10));
    assert_eq!(world.service.log, [], "no callback follows an error");
    assert_eq!(world.cx().connections(), 0);
}

#[test]
fn a_source_of_the_other_family_is_an_error_at_once() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let source = Some(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 0));
    let options = ConnectOptions { source, ..Default::default() };
    let error = world.cx().connect(address, &options, Conn::Connecting).unwrap_err().error;
    assert!(matches!(error, Error::Invalid(_)), "{error}");
}

#[test]
fn a_source_address_is_used() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    for last in 2..10 {
        let ip = IpAddr::V4(Ipv4Addr::new(127, 0, 0, last));
        let source = Some(SocketAddr::new(ip, 0));
        let options = ConnectOptions { source, ..Default::default() };
        let token = connect(&mut world, address, &options);
        world.until("the open", |world| world.service.saw(&Event::Open(token)));
        assert_eq!(world.cx().local_addr(token).unwrap().ip(), ip);
    }
}

#[test]
fn a_source_port_is_used_and_refused_when_taken() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    // A port that was just free, on an address of this test alone.
    let ip = IpAddr::V4(Ipv4Addr::new(127, 77, 1, 1));
    let source = TcpListener::bind(SocketAddr::new(ip, 0)).unwrap().local_addr().unwrap();
    let options = ConnectOptions { source: Some(source), ..Default::default() };
    let token = connect(&mut world, address, &options);
    world.until("the open", |world| world.service.saw(&Event::Open(token)));
    assert_eq!(world.cx().local_addr(token).unwrap(), source);
    assert!(world.cx().connect(address, &options, Conn::Connecting).is_err());
}

/// `IP_LOCAL_PORT_RANGE` needs Linux 6.3; before that, the reactor uses the system's range, as documented.
fn knows_port_ranges() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(3))
}

#[test]
fn a_port_range_is_respected_and_runs_out() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let ip = IpAddr::V4(Ipv4Addr::new(127, 77, 1, 2));
    let range = 40_000..=40_003;
    let options = ConnectOptions {
        source: Some(SocketAddr::new(ip, 0)),
        port_range: Some(range.clone()),
        ..Default::default()
    };
    for _ in range.clone() {
        let token = connect(&mut world, address, &options);
        world.until("the open", |world| world.service.saw(&Event::Open(token)));
        let port = world.cx().local_addr(token).unwrap().port();
        if !range.contains(&port) && !knows_port_ranges() {
            return;
        }
        assert!(range.contains(&port), "port {port}");
    }
    let error = world.cx().connect(address, &options, Conn::Connecting).unwrap_err().error;
    assert_eq!(error.errno(), Some(EADDRNOTAVAIL), "{error}");
    // With another destination, the same port gives another 5-tuple.
    let other = world.listen();
    let token = connect(&mut world, other, &options);
    world.until("the open", |world| world.service.saw(&Event::Open(token)));
}

#[test]
fn an_empty_port_range_is_an_error_at_once() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    #[allow(clippy::reversed_empty_ranges)] // The range is invalid on purpose.
    let options = ConnectOptions { port_range: Some(40_003..=40_000), ..Default::default() };
    let error = world.cx().connect(address, &options, Conn::Connecting).unwrap_err().error;
    assert!(matches!(error, Error::Invalid(_)), "{error}");
}

#[test]
fn connects_stop_at_the_bound() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { connections_max: 1, ..Default::default() });
    let (_held, address) = closed_port(LOOPBACK.ip());
    let first = connect(&mut world, address, &ConnectOptions::default());
    let error = world
        .cx()
        .connect(address, &ConnectOptions::default(), Conn::Connecting)
        .unwrap_err()
        .error;
    assert!(matches!(error, Error::Full { what: "connections", limit: 1 }), "{error}");
    world.until_closed(first);
    connect(&mut world, address, &ConnectOptions::default());
}

#[test]
fn reads_paused_while_connecting_stay_paused() {
    let _descriptors = Descriptors::counted();
    let listener = TcpListener::bind(LOOPBACK).unwrap();
    let mut world = World::new();
    let address = listener.local_addr().unwrap();
    let token = connect(&mut world, address, &ConnectOptions::default());
    world.cx().pause_reads(token);
    let (mut peer, _) = listener.accept().unwrap();
    std::io::Write::write_all(&mut peer, b"hello").unwrap();
    world.until("the open", |world| world.service.saw(&Event::Open(token)));
    world.run_for(Duration::from_millis(20));
    assert_eq!(world.service.data(token), b"");
    world.cx().resume_reads(token);
    world.until("the data", |world| world.service.data(token) == b"hello");
}

#[test]
fn many_connects_succeed_and_fail_side_by_side() {
    let _descriptors = Descriptors::counted();
    const EACH: usize = 200;
    let mut world = World::new();
    let address = world.listen();
    let (_held, closed) = closed_port(LOOPBACK.ip());
    let mut good = Vec::new();
    let mut bad = Vec::new();
    for _ in 0..EACH {
        good.push(connect(
            &mut world,
            address,
            &ConnectOptions { nodelay: true, ..Default::default() },
        ));
        bad.push(connect(&mut world, closed, &ConnectOptions::default()));
    }
    world.until("all decisions", |world| {
        world.service.opened().len() == 2 * EACH && world.service.closed().len() == EACH
    });
    for token in good {
        assert!(world.service.saw(&Event::Open(token)));
    }
    for token in bad {
        assert_eq!(world.service.why(token), Some(Why::ConnectFailed(ECONNREFUSED)));
    }
}
