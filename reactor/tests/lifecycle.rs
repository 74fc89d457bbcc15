//! Each accepted connection gets one `on_open`, then exactly one `on_close`, whatever closes it in whichever callback.
//! The recording service in `common` checks this in all tests.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::Duration;

use nix::libc::ECONNRESET;
use reactor::{
    Chunk, Config, ConnectOptions, Context, Error, FileTable, Handler, Incoming, ListenOptions,
    Reactor, Token, WriteError,
};

use common::descriptors::Descriptors;
use common::{Conn, Cx, Event, Why, World, echo, file_table, peer, read_to_end, reset};

/// A way to end a connection.
type End = fn(&mut Cx, Token);

/// Ends the connection, more than once, in the callback that `at` selects; then only `on_close` may follow.
fn end_within(at: fn(&Event) -> Option<Token>, provoke: fn(&mut World, &mut TcpStream)) {
    end_either_way(Why::Closed, at, provoke);
}

/// The same; `closed` is the expected reason if `close` was called first.
fn end_either_way(
    closed: Why,
    at: fn(&Event) -> Option<Token>,
    provoke: fn(&mut World, &mut TcpStream),
) {
    let ends: [(End, Why); 2] = [(Cx::close, closed), (Cx::abort, Why::Aborted)];
    for (end, why) in ends {
        let mut world = World::new();
        world.script(move |cx, event| {
            if let Some(token) = at(event) {
                end(cx, token);
                end(cx, token);
                cx.close(token);
                cx.abort(token);
                assert!(cx.holds(token), "the token is valid until on_close");
                assert_eq!(cx.write(token, b"too late"), Err(WriteError::Closed));
            } else if let Event::Open(token) = *event {
                cx.set_timeout(token, Duration::from_millis(1));
            }
        });
        let address = world.listen();
        let mut peer = peer(address);
        provoke(&mut world, &mut peer);
        world.until("the close", |world| !world.service.closed().is_empty());
        let token = world.service.opened()[0];
        assert_eq!(world.service.closed(), [(token, why)]);
        world.run_for(Duration::from_millis(10));
        assert!(matches!(world.service.log.last(), Some(Event::Close(..))));
        assert_eq!(world.cx().connections(), 0);
        assert!(
            read_to_end(&mut peer).1,
            "the last call was abort, but the peer received no reset"
        );
    }
}

#[test]
fn closing_within_on_open() {
    let _descriptors = Descriptors::counted();
    end_within(
        |event| match event {
            Event::Open(token) => Some(*token),
            _ => None,
        },
        |_, peer| peer.write_all(b"never read").unwrap(),
    );
}

#[test]
fn closing_within_on_data() {
    let _descriptors = Descriptors::counted();
    end_within(
        |event| match event {
            Event::Data(token, _) => Some(*token),
            _ => None,
        },
        |_, peer| peer.write_all(b"hello").unwrap(),
    );
}

#[test]
fn closing_within_on_eof() {
    let _descriptors = Descriptors::counted();
    end_either_way(
        Why::PeerClosed,
        |event| match event {
            Event::Eof(token) => Some(*token),
            _ => None,
        },
        |_, peer| peer.shutdown(Shutdown::Write).unwrap(),
    );
}

#[test]
fn closing_within_on_timeout() {
    let _descriptors = Descriptors::counted();
    end_within(
        |event| match event {
            Event::Timeout(token) => Some(*token),
            _ => None,
        },
        |_, _| {},
    );
}

#[test]
fn closing_within_on_drain() {
    let _descriptors = Descriptors::counted();
    // The kernel still has bytes to send, so the close is in progress when abort is called.
    end_either_way(
        Why::Aborted,
        |event| match event {
            Event::Drain(token) => Some(*token),
            _ => None,
        },
        |world, peer| {
            world.until("the open", |world| !world.service.opened().is_empty());
            let token = world.service.opened()[0];
            world.cx().clear_timeout(token);
            while world.cx().queued_bytes(token) == 0 {
                world.cx().write(token, &[7; 64 * 1024]).unwrap();
            }
            let mut sink = vec![0; 1 << 20];
            world.until("the drain", |world| {
                let _ = std::io::Read::read(peer, &mut sink).unwrap();
                world.cx().queued_bytes(token) == 0
            });
        },
    );
}

#[test]
fn a_reset_by_the_peer_ends_in_on_close_with_its_errno() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (peer, token) = world.pair(address);
    reset(peer);
    assert_eq!(world.until_closed(token), Why::Failed(ECONNRESET));
}

#[test]
fn a_reset_with_data_ends_only_its_connection() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (mut bystander, other) = world.pair(address);
    let (mut peer, token) = world.pair(address);
    peer.write_all(b"last words").unwrap();
    reset(peer);
    bystander.write_all(b"still here").unwrap();
    assert_eq!(world.until_closed(token), Why::Failed(ECONNRESET));
    world.until("the bystander", |world| world.service.data(other) == b"still here");
}

#[test]
fn the_end_of_input_is_reported_once_after_all_data() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (mut peer, token) = world.pair(address);
    peer.write_all(b"all there is").unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    world.until("the end", |world| world.service.saw(&Event::Eof(token)));
    assert_eq!(world.service.data(token), b"all there is");
    let wakeups = world.run_for(Duration::from_millis(100));
    assert!(wakeups <= 3, "{wakeups} wake-ups after the end was reported");
    assert!(world.cx().holds(token), "the script does not close");
}

#[test]
fn another_connection_can_be_closed_within_a_callback() {
    let _descriptors = Descriptors::counted();
    let ends: [(End, Why); 2] = [(Cx::close, Why::Closed), (Cx::abort, Why::Aborted)];
    for (end, why) in ends {
        let mut world = World::new();
        let address = world.listen();
        let (mut first, first_token) = world.pair(address);
        let (mut second, second_token) = world.pair(address);
        world.script(move |cx, event| {
            if let Event::Data(token, _) = *event {
                let other = if token == first_token { second_token } else { first_token };
                assert_eq!(cx.conn(other), Some(&Conn::Accepted));
                end(cx, other);
                assert!(cx.holds(other));
            }
        });
        // Both have an event in the same turn: the first one that is served closes the other.
        first.write_all(b"me").unwrap();
        second.write_all(b"me too").unwrap();
        world.until("one close", |world| !world.service.closed().is_empty());
        world.run_for(Duration::from_millis(10));
        assert_eq!(
            world.service.closed().len(),
            1,
            "the event of the closed connection was not discarded"
        );
        assert_eq!(world.service.closed()[0].1, why);
        assert_eq!(world.cx().stats().stale_events, 1);
        assert_eq!(world.service.count(|event| matches!(event, Event::Data(..))), 1);
    }
}

#[test]
fn on_close_can_open_and_close_others() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (_first, first) = world.pair(address);
    let (_second, second) = world.pair(address);
    let connected = Rc::new(RefCell::new(None));
    let seen = connected.clone();
    world.script(move |cx, event| match *event {
        Event::Close(token, _) if token == first => {
            cx.abort(second);
            let options = ConnectOptions::default();
            *seen.borrow_mut() = Some(cx.connect(address, &options, Conn::Connecting).unwrap());
        }
        _ => {}
    });
    world.cx().close(first);
    world.until("both ends", |world| {
        connected.borrow().is_some_and(|token| world.service.saw(&Event::Open(token)))
            && world.service.opened().len() == 4
    });
    assert_eq!(world.service.closed(), [(first, Why::Closed), (second, Why::Aborted)]);
}

#[test]
fn closing_between_turns_is_reported_in_the_next_one() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    world.cx().close(token);
    assert!(world.cx().holds(token));
    assert_eq!(world.service.closed(), []);
    assert_eq!(world.turn(Duration::ZERO), reactor::Status::Running);
    assert_eq!(world.service.closed(), [(token, Why::Closed)]);
}

/// Calls every method that takes a token with a stale one, and checks that nothing happens.
fn use_stale(cx: &mut Cx, stale: Token) {
    assert!(!cx.holds(stale));
    assert_eq!(cx.conn(stale), None);
    assert_eq!(cx.conn_mut(stale), None);
    assert_eq!(cx.queued_bytes(stale), 0);
    assert!(matches!(cx.peer_addr(stale), Err(Error::Stale)));
    assert!(matches!(cx.local_addr(stale), Err(Error::Stale)));
    assert_eq!(cx.write(stale, b"x"), Err(WriteError::Closed));
    assert_eq!(cx.write(stale, b""), Err(WriteError::Closed));
    assert_eq!(cx.write_vectored(stale, &[]), Err(WriteError::Closed));
    assert_eq!(cx.write_chunk(stale, Chunk::Owned(vec![1])), Err(WriteError::Closed));
    cx.set_timeout(stale, Duration::ZERO);
    cx.clear_timeout(stale);
    cx.pause_reads(stale);
    cx.resume_reads(stale);
    cx.finish(stale);
    cx.close(stale);
    cx.abort(stale);
}

#[test]
fn a_stale_token_matches_nothing_even_if_its_slot_is_reused() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    world.script(echo);
    let address = world.listen();
    let (_old_peer, old) = world.pair(address);
    world.cx().abort(old);
    world.until_closed(old);
    use_stale(world.cx(), old);

    let (mut new_peer, new) = world.pair(address);
    assert_eq!(old.index(), new.index(), "the slot is not reused");
    assert_ne!(old, new);
    assert_ne!(old.to_bits(), new.to_bits());
    let armed = world.cx().stats().timers_armed;
    use_stale(world.cx(), old);
    assert_eq!(world.cx().stats().timers_armed, armed);
    let tokens: Vec<_> = world.cx().tokens(0..usize::MAX).collect();
    assert_eq!(tokens, [new]);
    common::echo_once(&mut world, &mut new_peer, b"untouched");
    assert_eq!(world.service.closed().len(), 1);
}

#[test]
fn a_stale_token_matches_nothing_within_callbacks() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (_old_peer, old) = world.pair(address);
    world.cx().abort(old);
    world.until_closed(old);
    world.script(move |cx, event| {
        use_stale(cx, old);
        echo(cx, event);
    });
    let (mut new_peer, new) = world.pair(address);
    common::echo_once(&mut world, &mut new_peer, b"untouched");
    drop(new_peer);
    assert_eq!(world.until_closed(new), Why::PeerClosed);
}

#[test]
fn tokens_can_be_converted_to_64_bits_and_back() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    assert_eq!(Token::from_bits(token.to_bits()), Some(token));
}

#[test]
fn all_connections_can_be_visited_in_slices() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let mut pairs: Vec<_> = (0..10).map(|_| world.pair(address)).collect();
    let (_, gone) = pairs.remove(4);
    world.cx().abort(gone);
    world.until_closed(gone);
    let mut visited = Vec::new();
    for from in (0..world.cx().slots()).step_by(3) {
        visited.extend(world.cx().tokens(from..from + 3));
    }
    let expected: Vec<_> = pairs.iter().map(|&(_, token)| token).collect();
    assert_eq!(visited, expected);
    assert_eq!(world.cx().connections(), 9);
}

#[test]
fn random_ends_of_many_connections_keep_every_guarantee() {
    let _descriptors = Descriptors::counted();
    const CONNECTIONS: usize = 300;
    let mut world = World::with(Config { events_per_wait: 7, ..Default::default() });
    world.script(echo);
    let address = world.listen();
    let mut seed: u64 = 99;
    let mut number = move |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    let mut peers: Vec<TcpStream> = Vec::new();
    let mut made = 0;
    while made < CONNECTIONS || !peers.is_empty() {
        if made < CONNECTIONS && number(2) == 0 {
            peers.push(peer(address));
            made += 1;
        } else if !peers.is_empty() {
            let which = number(peers.len());
            match number(5) {
                0 => reset(peers.swap_remove(which)),
                1 => drop(peers.swap_remove(which)),
                2 => peers[which].shutdown(Shutdown::Write).unwrap_or(()),
                3 => {
                    let _ = peers[which].write_all(b"message");
                }
                _ => {
                    let tokens: Vec<_> = world.cx().tokens(0..usize::MAX).collect();
                    if !tokens.is_empty() {
                        let token = tokens[number(tokens.len())];
                        if number(2) == 0 {
                            world.cx().close(token)
                        } else {
                            world.cx().abort(token)
                        }
                    }
                }
            }
        }
        if number(3) == 0 {
            let _ = world.turn(Duration::ZERO);
        }
    }
    world.until("all ends", |world| {
        world.service.opened().len() == CONNECTIONS && world.cx().connections() == 0
    });
    assert_eq!(world.service.closed().len(), CONNECTIONS);
    assert_eq!(world.cx().stats().open(), 0);
}

struct Panics;

impl Handler for Panics {
    type Conn = ();

    fn on_accept(&mut self, _cx: &mut Context<()>, _incoming: &Incoming<'_>) -> Option<()> {
        panic!("on purpose");
    }

    fn on_data(&mut self, _cx: &mut Context<()>, _token: Token, _conn: &mut (), _bytes: &mut [u8]) {
    }
}

#[test]
fn after_a_panic_in_a_callback_each_turn_returns_an_error() {
    let _descriptors = Descriptors::counted();
    let mut reactor =
        Reactor::new(&Config { file_table: file_table(), ..Config::default() }).unwrap();
    let listener = reactor.context().listen(common::LOOPBACK, &ListenOptions::default()).unwrap();
    let _peer = peer(reactor.context().listener_addr(listener).unwrap());
    // A trait object as the handler, as in a program with plug-ins.
    let handler: &mut dyn Handler<Conn = ()> = &mut Panics;
    let turn = AssertUnwindSafe(|| reactor.turn(handler, Some(common::DEADLINE)).map(drop));
    assert!(catch_unwind(turn).is_err());
    for _ in 0..2 {
        let refused = reactor.turn(&mut Panics, Some(common::DEADLINE)).unwrap_err();
        assert!(refused.to_string().contains("panicked"), "{refused}");
    }
}

#[test]
fn the_addresses_of_a_connection_are_available_in_its_on_close() {
    let _descriptors = Descriptors::counted();
    type End = fn(&mut World, TcpStream, Token);
    let ends: [End; 4] = [
        |world, _peer, token| world.cx().close(token),
        |world, _peer, token| world.cx().abort(token),
        |_, peer, _| reset(peer),
        |_, peer, _| drop(peer),
    ];
    for end in ends {
        let mut world = World::new();
        let asked = Rc::new(RefCell::new(Vec::new()));
        let answers = asked.clone();
        world.script(move |cx, event| match event {
            Event::Close(token, _) => {
                answers.borrow_mut().push((cx.peer_addr(*token), cx.local_addr(*token)));
            }
            Event::Eof(token) => cx.close(*token),
            _ => {}
        });
        let address = world.listen();
        let (peer, token) = world.pair(address);
        let expected = peer.local_addr().unwrap();
        end(&mut world, peer, token);
        world.until_closed(token);
        let (remote, local) = asked.borrow_mut().pop().unwrap();
        assert_eq!((remote.unwrap(), local.unwrap()), (expected, address));
        assert!(matches!(world.cx().peer_addr(token), Err(Error::Stale)));
    }
}

#[test]
fn a_connect_in_on_close_can_reuse_the_closed_descriptor() {
    let _descriptors = Descriptors::counted();
    const NAME: &str = "a_connect_in_on_close_can_reuse_the_closed_descriptor";
    if !common::child::is_child() {
        // In a separate process, because the limit applies to the whole process.
        return common::child::run_alone(NAME, 200);
    }
    let mut world = World::new();
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    if world.cx().file_table() != FileTable::Process {
        return; // A registered file has no descriptor that could be reused.
    }
    let mut all = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        all.push(file);
    }
    world.script(move |cx, event| {
        if matches!(event, Event::Close(closed, _) if *closed == token) {
            cx.connect(address, &ConnectOptions::default(), Conn::Connecting).unwrap();
        }
    });
    world.cx().abort(token);
    world.until_closed(token);
}

#[test]
fn a_deferred_call_follows_after_the_other_events_without_a_wait() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let pairs: Vec<_> = (0..3).map(|_| world.pair(address)).collect();
    let mut calls = 0;
    world.script(move |cx, event| match event {
        Event::Data(token, _) => cx.defer(*token).unwrap(),
        Event::Deferred(token) => {
            calls += 1;
            if calls < 200 {
                cx.defer(*token).unwrap();
            }
        }
        _ => {}
    });
    for (mut peer, _) in pairs.iter().map(|(peer, token)| (peer, token)) {
        peer.write_all(b"x").unwrap();
    }
    let before = world.service.log.len();
    world.run_for(Duration::from_millis(20));
    let log = world.service.log.split_off(before);
    let kinds: Vec<_> = log.iter().map(|event| matches!(event, Event::Deferred(_))).collect();
    assert_eq!(kinds[..6], [false, false, false, true, true, true], "{log:?}");
    let deferred = kinds.iter().filter(|&&is_deferred| is_deferred).count();
    assert_eq!(deferred, 202, "two other deferred calls were pending at the last one");

    let (_, token) = pairs[0];
    world.cx().defer(token).unwrap();
    world.cx().abort(token);
    assert!(matches!(world.cx().defer(token), Err(Error::Stale)), "it is being closed");
    world.until_closed(token);
    world.run_for(Duration::from_millis(5));
    assert!(
        !world.service.log.contains(&Event::Deferred(token)),
        "a deferred call of a removed connection"
    );
    assert!(matches!(world.cx().defer(token), Err(Error::Stale)));
}

/// Each closed connection is replaced by one that is closed immediately.
#[test]
fn timers_fire_although_on_close_closes_further_connections_without_end() {
    let _descriptors = Descriptors::counted();
    let mut world = World::new();
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    let mut is_over = false;
    world.script(move |cx, event| match event {
        Event::Timer(_) => is_over = true,
        Event::Close(..) if !is_over => {
            let next = cx.connect(address, &ConnectOptions::default(), Conn::Connecting).unwrap();
            cx.abort(next);
        }
        _ => {}
    });
    let timer = world.cx().add_timer(Duration::from_millis(5)).unwrap();
    world.cx().abort(token);
    world.until("the timer", |world| world.service.saw(&Event::Timer(timer)));
    world.until("the end", |world| world.cx().connections() == 0);
}

#[test]
fn a_refused_chunk_is_returned() {
    let _descriptors = Descriptors::counted();
    let mut world = World::with(Config { write_queue_bytes_max: 1000, ..Config::default() });
    let address = world.listen();
    let (_peer, token) = world.pair(address);
    let refused = world.cx().try_write_chunk(token, vec![7; 1001]).unwrap_err();
    assert_eq!((refused.error, refused.chunk.as_bytes().len()), (WriteError::Full, 1001));
    assert!(world.cx().try_write_chunk(token, refused.chunk.as_bytes()[..1000].to_vec()).is_ok());
    world.cx().abort(token);
    world.until_closed(token);
    let refused = world.cx().try_write_chunk(token, vec![7; 10]).unwrap_err();
    assert!(
        matches!((refused.error, refused.chunk), (WriteError::Closed, Chunk::Owned(bytes)) if bytes == [7; 10])
    );
}
