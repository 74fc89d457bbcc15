//! Listening and accepting: addresses, refusals, pauses and backlogs.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::io::Write;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use nix::libc::EADDRINUSE;
use reactor::{
    Config, ConnectOptions, Error, Handler, Incoming, ListenOptions, ListenerId, Reactor,
};

use common::descriptors::Descriptors;
use common::{
    Conn, Cx, Event, LOOPBACK, Why, World, echo, echo_once, file_table, peer, read_to_end, reset,
};

#[test]
fn a_refused_peer_sees_a_reset_and_no_other_callback_follows() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.service.refusing = true;
    let address = world.listen();
    let mut peers: Vec<_> = (0..5).map(|_| peer(address)).collect();
    world.until("the refusals", |world| world.cx().stats().refused == 5);
    for peer in &mut peers {
        assert_eq!(read_to_end(peer), (Vec::new(), true));
    }
    assert_eq!(world.service.log, []);
    assert_eq!(world.cx().connections(), 0);
    assert_eq!(world.cx().stats().accepted, 0);

    world.service.refusing = false;
    world.script(echo);
    let (mut welcome, _) = world.pair(address);
    echo_once(&mut world, &mut welcome, b"hello");
}

#[test]
fn ipv4_and_ipv6_listeners_serve_side_by_side() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.script(echo);
    let v6 = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 0);
    for address in [LOOPBACK, v6] {
        let listener = world.cx().listen(address, &ListenOptions::default()).unwrap();
        let address = world.cx().listener_addr(listener).unwrap();
        let (mut peer, token) = world.pair(address);
        echo_once(&mut world, &mut peer, b"either way");
        assert_eq!(world.cx().peer_addr(token).unwrap(), peer.local_addr().unwrap());
        assert_eq!(world.cx().local_addr(token).unwrap(), address);
    }
}

#[test]
fn an_ipv6_wildcard_accepts_ipv4_unless_disabled() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let wildcard = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0);
    let both = world.cx().listen(wildcard, &ListenOptions::default()).unwrap();
    let port = world.cx().listener_addr(both).unwrap().port();
    world.pair(SocketAddr::new(LOOPBACK.ip(), port));

    let options = ListenOptions { only_v6: true, ..Default::default() };
    let only_v6 = world.cx().listen(wildcard, &options).unwrap();
    let port = world.cx().listener_addr(only_v6).unwrap().port();
    world.pair(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port));
    assert!(TcpStream::connect(SocketAddr::new(LOOPBACK.ip(), port)).is_err());
}

#[test]
fn on_accept_knows_the_listener_and_both_addresses() {
    let _descriptors = Descriptors::counted();
    #[derive(Default)]
    struct Seen(Vec<(ListenerId, SocketAddr, SocketAddr)>);
    impl Handler for Seen {
        type Conn = Conn;
        fn on_accept(&mut self, _cx: &mut Cx, incoming: &Incoming<'_>) -> Option<Conn> {
            let addresses = (incoming.peer_addr().unwrap(), incoming.local_addr().unwrap());
            self.0.push((incoming.listener(), addresses.0, addresses.1));
            None
        }
        fn on_data(&mut self, _: &mut Cx, _: reactor::Token, _: &mut Conn, _: &mut [u8]) {}
    }
    let mut reactor =
        Reactor::new(&Config { file_table: file_table(), ..Config::default() }).unwrap();
    let mut seen = Seen::default();
    let options = ListenOptions::default();
    let listeners: Vec<_> =
        (0..3).map(|_| reactor.context().listen(LOOPBACK, &options).unwrap()).collect();
    for &listener in &listeners {
        let address = reactor.context().listener_addr(listener).unwrap();
        let peer = peer(address);
        while seen.0.last().is_none_or(|last| last.0 != listener) {
            let _ = reactor.turn(&mut seen, Some(common::DEADLINE)).unwrap();
        }
        assert_eq!(seen.0.last(), Some(&(listener, peer.local_addr().unwrap(), address)));
    }
}

#[test]
fn a_port_in_use_is_an_error_that_names_the_call() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let error = world.cx().listen(address, &ListenOptions::default()).unwrap_err();
    assert_eq!(error.errno(), Some(EADDRINUSE));
    assert!(error.to_string().starts_with("listen: ") || error.to_string().starts_with("bind: "));
    assert_eq!(world.cx().listeners().count(), 1);
    world.pair(address);
}

#[test]
fn a_port_is_free_again_as_soon_as_its_listener_is_gone() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let (listener, address) = world.listener();
    let (_peer, token) = world.pair(address);
    world.cx().unlisten(listener);
    world.cx().unlisten(listener);
    assert!(matches!(world.cx().listener_addr(listener), Err(Error::Stale)));
    assert!(TcpStream::connect(address).is_err());
    assert!(world.cx().holds(token), "connections remain when their listener is removed");
    world.cx().listen(address, &ListenOptions::default()).unwrap();
    world.pair(address);
}

#[test]
fn two_reactors_can_share_a_port() {
    let _descriptors = Descriptors::counted();
    let options = ListenOptions { reuse_port: true, ..Default::default() };
    let (mut first, mut second) = (World::new(), World::new());
    let listener = first.cx().listen(LOOPBACK, &options).unwrap();
    let address = first.cx().listener_addr(listener).unwrap();
    second.cx().listen(address, &options).unwrap();
    let peers: Vec<_> = (0..64).map(|_| peer(address)).collect();
    first.until("all of them", |first| {
        let _ = second.turn(Duration::ZERO);
        first.cx().connections() + second.cx().connections() == peers.len()
    });
    assert!(first.cx().connections() > 0 && second.cx().connections() > 0);
}

#[test]
fn a_hundred_listeners_serve_from_one_reactor() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.script(echo);
    let addresses: Vec<_> = (0..100).map(|_| world.listen()).collect();
    assert_eq!(world.cx().listeners().count(), 100);
    let mut peers: Vec<_> = addresses.iter().map(|&address| peer(address)).collect();
    world.until("all of them", |world| world.service.opened().len() == 100);
    for peer in &mut peers {
        echo_once(&mut world, peer, b"hello");
    }
}

#[test]
fn listeners_have_a_bound() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { listeners_max: 2, ..Default::default() });
    let (first, _) = world.listener();
    world.listen();
    let error = world.cx().listen(LOOPBACK, &ListenOptions::default()).unwrap_err();
    assert!(matches!(error, Error::Full { what: "listeners", limit: 2 }), "{error}");
    world.cx().unlisten(first);
    world.listen();
}

#[test]
fn more_peers_than_one_wake_accepts_are_all_accepted() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { accepts_per_wake: 3, ..Default::default() });
    let address = world.listen();
    let peers: Vec<_> = (0..50).map(|_| peer(address)).collect();
    world.until("all of them", |world| world.service.opened().len() == peers.len());
    assert_eq!(world.cx().stats().accepted, 50);
    assert!(world.cx().stats().wakeups >= 50 / 3);
}

#[test]
fn a_paused_listener_queues_peers_without_wake_ups() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let (listener, address) = world.listener();
    world.cx().pause_accepts(listener).unwrap();
    world.cx().pause_accepts(listener).unwrap();
    let _peer = peer(address);
    let wakeups = world.run_for(Duration::from_millis(100));
    assert!(wakeups <= 2, "{wakeups} needless wake-ups");
    assert_eq!(world.service.opened(), []);
    world.cx().resume_accepts(listener).unwrap();
    world.until("the accept", |world| world.service.opened().len() == 1);
}

#[test]
fn pausing_within_a_callback_stops_the_batch() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let (listener, address) = world.listener();
    world.script(move |cx, event| {
        if let Event::Open(_) = event {
            cx.pause_accepts(listener).unwrap();
        }
    });
    let _peers: Vec<_> = (0..3).map(|_| peer(address)).collect();
    for expected in 1..=3 {
        world.until("one accept", |world| world.service.opened().len() == expected);
        world.run_for(Duration::from_millis(10));
        assert_eq!(world.service.opened().len(), expected);
        world.cx().resume_accepts(listener).unwrap();
    }
}

#[test]
fn unlistening_within_a_callback_resets_waiting_peers() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let (listener, address) = world.listener();
    let mut peers: Vec<_> = (0..3).map(|_| peer(address)).collect();
    world.script(move |cx, event| {
        if let Event::Open(_) = event {
            cx.unlisten(listener);
        }
    });
    world.until("one accept", |world| world.service.opened().len() == 1);
    world.run_for(Duration::from_millis(10));
    assert_eq!(world.service.opened().len(), 1);
    for peer in &mut peers[1..] {
        assert!(read_to_end(peer).1);
    }
}

#[test]
fn a_smaller_backlog_queues_fewer_peers() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let (listener, address) = world.listener();
    world.cx().pause_accepts(listener).unwrap();
    world.cx().set_backlog(listener, Some(2)).unwrap();
    let quick = Duration::from_millis(50);
    let waiting: Vec<_> =
        std::iter::from_fn(|| TcpStream::connect_timeout(&address, quick).ok()).take(50).collect();
    assert!(waiting.len() < 10, "{} are in a backlog of 2", waiting.len());
    world.cx().set_backlog(listener, None).unwrap();
    let more: Vec<_> = (0..20).map(|_| peer(address)).collect();
    world.cx().resume_accepts(listener).unwrap();
    let all = waiting.len() + more.len();
    world.until("all of them", |world| world.service.opened().len() >= all);
}

#[test]
fn a_stale_listener_id_matches_nothing() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let (old, _) = world.listener();
    world.cx().unlisten(old);
    let (new, address) = world.listener();
    assert_ne!(old, new);
    assert!(matches!(world.cx().listener_addr(old), Err(Error::Stale)));
    assert!(matches!(world.cx().pause_accepts(old), Err(Error::Stale)));
    assert!(matches!(world.cx().resume_accepts(old), Err(Error::Stale)));
    assert!(matches!(world.cx().set_backlog(old, None), Err(Error::Stale)));
    world.cx().unlisten(old);
    world.pair(address);
}

#[test]
fn a_peer_that_resets_before_it_is_accepted_does_not_affect_others() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.script(echo);
    let (listener, address) = world.listener();
    world.cx().pause_accepts(listener).unwrap();
    for _ in 0..10 {
        reset(peer(address));
    }
    let mut welcome = peer(address);
    world.cx().resume_accepts(listener).unwrap();
    echo_once(&mut world, &mut welcome, b"hello");
    // Linux accepts connections that were reset meanwhile: they open, and close with the error.
    for (_, why) in world.service.closed() {
        assert_eq!(why, Why::Failed(nix::libc::ECONNRESET));
    }
    assert_eq!(world.cx().connections(), 1);
}

/// A way for a peer to end, which must be served before its slot is free.
type End = fn(TcpStream);

#[test]
fn ended_connections_free_their_slots_before_accepts() {
    let _descriptors = Descriptors::counted();
    const SLOTS: usize = 64;
    let finish: End = drop;
    let send_and_finish: End = |mut peer| peer.write_all(b"the last words").unwrap();
    for (end, events_per_wait) in [finish, send_and_finish, reset].into_iter().zip([8, 8, 200]) {
        let config = Config { connections_max: SLOTS, events_per_wait, ..Config::default() };
        let mut world = World::with(config);
        // Closes connections that have finished. Answers nothing, so that no close with unread bytes causes a reset.
        world.script(|cx, event| {
            if let Event::Eof(token) = event {
                cx.close(*token);
            }
        });
        let address = world.listen();
        let leaving: Vec<_> = (0..SLOTS).map(|_| world.pair(address).0).collect();

        // The listener becomes ready first, and then each connection.
        let newcomers: Vec<_> = (0..SLOTS).map(|_| peer(address)).collect();
        leaving.into_iter().for_each(end);
        world.until("the accepts", |world| world.service.opened().len() == 2 * SLOTS);
        assert_eq!(world.service.closed().len(), newcomers.len());
        assert_eq!(world.service.count(|event| matches!(event, Event::AcceptError(..))), 0);
        assert_eq!(world.cx().stats().accept_pauses, 0);
    }
}

#[test]
fn a_full_reactor_reports_it_even_if_a_connection_is_always_ready() {
    let _descriptors = Descriptors::counted();
    let config = Config {
        connections_max: 1,
        events_per_wait: 1,
        read_buffer_bytes: 1,
        ..Config::default()
    };
    let mut world = World::with(config);
    let address = world.listen();
    let (mut busy, _) = world.pair(address);
    busy.write_all(&[7; 4096]).unwrap();
    let _newcomer = peer(address);
    let is_full = |event: &Event| matches!(event, Event::AcceptError(..));
    world.until("the error", |world| world.service.count(is_full) > 0);
    assert!(world.service.count(|event| matches!(event, Event::Data(..))) < 4096, "too late");
}

#[test]
fn accepts_leave_the_slots_that_are_reserved_for_connects() {
    let _descriptors = Descriptors::counted();
    let config = Config { connections_max: 5, connects_reserved: 2, ..Config::default() };
    let mut world = World::with(config);
    let address = world.listen();
    let other = std::net::TcpListener::bind(common::LOOPBACK).unwrap();
    let other_address = other.local_addr().unwrap();
    let _peers: Vec<_> = (0..5).map(|_| peer(address)).collect();
    let is_full = |event: &Event| matches!(event, Event::AcceptError(..));
    world.until("the error", |world| world.service.count(is_full) > 0);
    assert_eq!(world.cx().connections(), 3);
    let mut connect =
        || world.cx().connect(other_address, &ConnectOptions::default(), Conn::Connecting);
    let connected = [connect().unwrap(), connect().unwrap()];
    assert!(matches!(connect().unwrap_err().error, Error::Full { limit: 5, .. }));

    // Slots that connects free are for connects.
    world.cx().abort(connected[0]);
    world.until_closed(connected[0]);
    world.run_for(Duration::from_millis(50));
    assert_eq!(world.cx().connections(), 4);
    assert_eq!(world.cx().stats().accepted, 3);
    world.cx().abort(connected[1]);
    let first = world.service.opened()[0];
    world.cx().abort(first);
    world.until("another accept", |world| world.cx().stats().accepted == 4);
}

#[test]
fn a_proxy_that_reserves_half_of_the_slots_fills_all_with_pairs() {
    let _descriptors = Descriptors::counted();
    // No pause ends within the test: a listener resumes only because a connection was removed.
    let (accept_pause_min, accept_pause_max) = (2 * common::DEADLINE, 2 * common::DEADLINE);
    let mut world = World::with(Config {
        connections_max: 6,
        connects_reserved: 3,
        accept_pause_min,
        accept_pause_max,
        ..Config::default()
    });
    let address = world.listen();
    let upstream = std::net::TcpListener::bind(common::LOOPBACK).unwrap();
    let upstream_address = upstream.local_addr().unwrap();
    let a_connect = move |cx: &mut Cx| {
        let slots = 0..cx.slots();
        let is_one = |&token: &_| cx.peer_addr(token).is_ok_and(|peer| peer == upstream_address);
        cx.tokens(slots).find(is_one).unwrap()
    };
    // Each client has its connect before the next client is accepted, and both end together.
    world.script(move |cx, event| match event {
        Event::Open(token) if cx.local_addr(*token).unwrap() == address => {
            cx.connect(upstream_address, &ConnectOptions::default(), Conn::Connecting).unwrap();
        }
        Event::Eof(token) => {
            cx.abort(*token);
            let connect = a_connect(cx);
            cx.abort(connect);
        }
        _ => {}
    });
    let mut peers: Vec<_> = (0..5).map(|_| peer(address)).collect();
    let full = "accepted connections is at its bound of 3";
    let is_full = |event: &Event| matches!(event, Event::AcceptError(_, why) if why == full);
    world.until("the pairs", |world| {
        world.cx().stats().connected == 3 && world.service.count(is_full) == 1
    });
    assert_eq!((world.cx().connections(), world.cx().stats().accepted), (6, 3));

    // A connect that ends makes no room for a client, and the listener is not resumed.
    let outbound = a_connect(world.cx());
    world.cx().abort(outbound);
    world.until_closed(outbound);
    world.run_for(Duration::from_millis(20));
    assert_eq!((world.cx().connections(), world.cx().stats().accepted), (5, 3));
    assert_eq!((world.service.count(is_full), world.cx().stats().accept_pauses), (1, 1));
    world.cx().connect(upstream_address, &ConnectOptions::default(), Conn::Connecting).unwrap();
    world.until("the connect", |world| world.cx().stats().connected == 4);

    // A client that ends does, and the next client is accepted and gets its connect.
    drop(peers.remove(0));
    world.until("the next pair", |world| {
        let stats = world.cx().stats();
        (stats.accepted, stats.connected) == (4, 5)
    });
}

#[test]
fn connects_beyond_the_reserved_slots_take_free_ones() {
    let _descriptors = Descriptors::counted();
    let config = Config { connections_max: 4, connects_reserved: 1, ..Config::default() };
    let mut world = World::with(config);
    let address = world.listen();
    let elsewhere = std::net::TcpListener::bind(common::LOOPBACK).unwrap();
    let elsewhere_address = elsewhere.local_addr().unwrap();
    let connect = |world: &mut World| {
        world.cx().connect(elsewhere_address, &ConnectOptions::default(), Conn::Connecting)
    };
    let connected: Vec<_> = (0..3).map(|_| connect(&mut world).unwrap()).collect();
    let _peers = [peer(address), peer(address)];
    let full = "connections is at its bound of 4";
    let is_full = |event: &Event| matches!(event, Event::AcceptError(_, why) if why == full);
    world.until("the error", |world| world.service.count(is_full) > 0);
    assert_eq!((world.cx().stats().accepted, world.cx().connections()), (1, 4));
    world.cx().abort(connected[0]);
    world.until("another accept", |world| world.cx().stats().accepted == 2);
    assert!(matches!(connect(&mut world).unwrap_err().error, Error::Full { limit: 4, .. }));
}

#[test]
fn not_all_slots_can_be_reserved() {
    let _descriptors = Descriptors::counted();
    let config = Config { connections_max: 5, connects_reserved: 5, ..Config::default() };
    assert!(matches!(Reactor::<Conn>::new(&config), Err(Error::Invalid(_))));
}

#[test]
fn a_drained_listener_accepts_all_waiting_peers_before_it_ends() {
    let _descriptors = Descriptors::counted();
    for paused in [false, true] {
        let mut world = World::with(Config { accepts_per_wake: 3, ..Config::default() });
        let (listener, address) = world.listener();
        if paused {
            world.cx().pause_accepts(listener).unwrap();
        }
        let _peers: Vec<_> = (0..20).map(|_| peer(address)).collect();
        world.cx().drain_listener(listener);
        world.until("the end", |world| world.cx().listeners().count() == 0);
        assert_eq!(world.service.opened().len(), 20);
        assert!(matches!(world.cx().listener_addr(listener), Err(Error::Stale)));
        assert!(TcpStream::connect(address).is_err(), "the listener still exists");
        assert_eq!(world.service.log.last(), Some(&Event::ListenerDrained(listener)));
        world.cx().drain_listener(listener);
        let _ = world.turn(Duration::ZERO);
        assert_eq!(world.service.count(is_drained), 1);
    }
}

fn is_drained(event: &Event) -> bool {
    matches!(event, Event::ListenerDrained(_))
}

#[test]
fn the_end_of_a_draining_listener_by_another_call_is_not_reported() {
    let _descriptors = Descriptors::counted();
    let ends: [fn(&mut World, ListenerId); 3] = [
        |world, listener| world.cx().unlisten(listener),
        |world, listener| drop(world.cx().detach_listener(listener).unwrap()),
        |world, _| world.cx().shutdown(Duration::ZERO),
    ];
    for end in ends {
        let mut world = World::new();
        let (listener, address) = world.listener();
        let _peer = peer(address);
        world.cx().drain_listener(listener);
        end(&mut world, listener);
        world.run_for(Duration::from_millis(20));
        assert_eq!(world.service.log, []);
    }
}

/// epoll reports a file as long as it is open anywhere.
#[test]
fn a_removed_listener_that_is_open_elsewhere_is_not_reported() {
    let _descriptors = Descriptors::counted();
    let ends: [fn(&mut World, ListenerId); 2] = [
        |world, listener| world.cx().unlisten(listener),
        |world, listener| {
            world.cx().drain_listener(listener);
            let ended = Event::ListenerDrained(listener);
            world.until("the end", |world| world.service.saw(&ended));
        },
    ];
    for end in ends {
        let mut world = World::new();
        let elsewhere = std::net::TcpListener::bind(LOOPBACK).unwrap();
        let address = elsewhere.local_addr().unwrap();
        let ours = elsewhere.try_clone().unwrap();
        let listener = world.cx().adopt_listener(ours, &ListenOptions::default()).unwrap();
        end(&mut world, listener);
        let mut peer = peer(address);
        let wakeups = world.run_for(Duration::from_millis(50));
        assert!(wakeups <= 2, "the reactor spins: {wakeups} wake-ups");
        assert_eq!(world.cx().stats().stale_events, 0);
        // The peer waits in the backlog for the other owner of the socket.
        elsewhere.set_nonblocking(false).unwrap();
        let (mut accepted, _) = elsewhere.accept().unwrap();
        peer.write_all(b"!").unwrap();
        std::io::Read::read_exact(&mut accepted, &mut [0]).unwrap();
    }
}

#[test]
fn an_empty_listener_is_drained_at_once() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let (listener, _) = world.listener();
    world.cx().drain_listener(listener);
    let _ = world.turn(common::DEADLINE);
    assert_eq!(world.cx().listeners().count(), 0);
    assert_eq!(world.service.log, [Event::ListenerDrained(listener)]);
}

#[test]
fn a_drained_listener_waits_for_slots() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { connections_max: 2, ..Config::default() });
    let (listener, address) = world.listener();
    let _peers: Vec<_> = (0..5).map(|_| peer(address)).collect();
    world.cx().drain_listener(listener);
    for accepted in 2..=5 {
        world.until("an accept", |world| world.cx().stats().accepted == accepted);
        let wakeups = world.run_for(Duration::from_millis(30));
        assert!(wakeups < 20, "the reactor spins: {wakeups} wake-ups");
        if accepted < 5 {
            assert_eq!(world.cx().listeners().count(), 1);
            assert_eq!(world.service.count(is_drained), 0);
            let first = world.service.opened()[accepted as usize - 2];
            world.cx().abort(first);
            world.until_closed(first);
        }
    }
    // The reactor sees that the backlog is empty only when it has a slot to accept.
    let last = world.service.opened()[4];
    world.cx().abort(last);
    world.until("the end", |world| world.cx().listeners().count() == 0);
    assert_eq!(world.service.count(is_drained), 1);
    assert_eq!(world.cx().stats().dropped, 0);
}

#[test]
fn slots_without_address_space_are_refused_with_their_size() {
    let _descriptors = Descriptors::counted();
    let config = Config { connections_max: u32::MAX as usize, ..Config::default() };
    let refused = Reactor::<[u64; 8192]>::new(&config).unwrap_err();
    let Error::NoAddressSpace { connections_max, bytes_each } = refused else {
        panic!("{refused}");
    };
    assert_eq!((connections_max, bytes_each), (u32::MAX as usize, 24 + 8 * 8192));
}

#[test]
fn a_listener_has_no_more_connections_than_its_own_bound() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.script(echo);
    let options = ListenOptions { connections_max: Some(2), ..ListenOptions::default() };
    let bounded = world.cx().listen(LOOPBACK, &options).unwrap();
    let address = world.cx().listener_addr(bounded).unwrap();
    let other = world.listen();
    let mut peers: Vec<_> = (0..6).map(|_| peer(address)).collect();
    let error = "connections of the listener is at its bound of 2".to_owned();
    let held_back = Event::AcceptError(bounded, error);
    world.until("the bound", |world| world.service.saw(&held_back));
    assert_eq!(world.cx().connections(), 2);

    // Waiting peers cause no work, and the other listener accepts.
    let wakeups = world.run_for(Duration::from_millis(200));
    assert!(wakeups <= 2, "{wakeups} wake-ups while peers wait");
    let (_free, _) = world.pair(other);
    assert_eq!(world.cx().connections(), 3);
    assert_eq!(world.service.count(|event| *event == held_back), 1);

    // Each connection that ends, in whatever way, makes room for the next.
    for ended in 1..=4 {
        let first = world.service.opened().into_iter().find(|&token| {
            world.service.why(token).is_none() && world.reactor.context().holds(token)
        });
        if ended % 2 == 0 {
            world.cx().abort(first.unwrap());
        }
        drop(peers.remove(0));
        world.until("the next", |world| world.cx().stats().accepted == 3 + ended);
    }
    assert_eq!(world.cx().stats().dropped, 0);
    world.cx().unlisten(bounded);
    world.run_for(Duration::from_millis(20));
}

#[test]
fn connections_of_a_removed_listener_do_not_count_for_the_next() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let options = ListenOptions { connections_max: Some(1), ..ListenOptions::default() };
    let mut tokens = Vec::new();
    let mut peers = Vec::new();
    for _ in 0..3 {
        let listener = world.cx().listen(LOOPBACK, &options).unwrap();
        let address = world.cx().listener_addr(listener).unwrap();
        let (peer, token) = world.pair(address);
        world.cx().unlisten(listener);
        tokens.push(token);
        peers.push(peer);
    }
    for token in tokens {
        world.cx().abort(token);
    }
    world.until("all ends", |world| world.cx().connections() == 0);
}
