//! Runs against an echo server in a thread, turn by turn, so that a signal can come in any turn.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use c1000k_host::limits::raise_descriptor_limit;
use reactor::{Config, ListenOptions, Reactor, Status};

use super::*;
use crate::failures;
use crate::protocols::{Echo, Tls};

/// No run of a test is longer.
const DEADLINE: Duration = Duration::from_secs(60);

/// An echo server without faults.
struct EchoServer {
    port: u16,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EchoServer {
    fn start() -> Self {
        // Both ends are in this process.
        raise_descriptor_limit().unwrap();
        let is_over = Arc::new(AtomicBool::new(false));
        let is_ended = Arc::clone(&is_over);
        let mut reactor = Reactor::new(&Config::default()).unwrap();
        let cx = reactor.context();
        let listener = cx.listen((Ipv4Addr::LOCALHOST, 0), &ListenOptions::default()).unwrap();
        let port = cx.listener_addr(listener).unwrap().port();
        let thread = thread::spawn(move || {
            while !is_ended.load(Ordering::Acquire) {
                let _ = reactor.turn(&mut EchoBack, Some(Duration::from_millis(10))).unwrap();
            }
        });
        Self { port, is_over, thread: Some(thread) }
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        self.thread.take().map(JoinHandle::join);
    }
}

struct EchoBack;

impl Handler for EchoBack {
    type Conn = ();

    fn on_accept(&mut self, _: &mut Context<()>, _: &Incoming<'_>) -> Option<()> {
        Some(())
    }

    fn on_data(&mut self, cx: &mut Context<()>, token: Token, (): &mut (), bytes: &mut [u8]) {
        let _ = cx.write(token, bytes);
    }
}

fn settings(goal: u32) -> Settings {
    Settings {
        goal,
        verify: true,
        hold: Duration::from_millis(2),
        workload: None,
        timeout: Duration::from_secs(10),
        in_flight_max: 64,
        stages: vec![],
        churn_per_second: None,
        storm: false,
        endpoint: None,
        local_ports: None,
        consecutive_failures_max: 100,
    }
}

type EchoConn = Conn<<Echo as Protocol>::State>;

fn client(
    settings: Settings,
    ip: impl Into<IpAddr>,
    plan: Plan,
    progress: &Progress,
) -> (Reactor<EchoConn>, Client<'_, Echo>) {
    let connections_max = settings.goal as usize + 64;
    let reactor = Reactor::new(&Config { connections_max, ..Config::default() }).unwrap();
    let stats = RunStats::new(Instant::now(), settings.verify).unwrap();
    let destination = Destination::new((ip.into(), plan.port(0)), 1);
    let server = Server { destination, plan, protocol: Echo };
    (reactor, Client::new(settings, vec![server], stats, progress).unwrap())
}

/// From any address to one port.
fn plan(port: u16) -> Plan {
    Plan::new(vec![], port, 1, 28_232)
}

/// Runs it to its end, with a signal before the given turn; returns the number of turns.
fn run(
    reactor: &mut Reactor<EchoConn>,
    client: &mut Client<'_, Echo>,
    signal_at: Option<usize>,
) -> usize {
    let began = Instant::now();
    client.start(reactor.context());
    for turn in 0.. {
        assert!(began.elapsed() < DEADLINE, "{client:?}");
        if signal_at == Some(turn) {
            client.on_signal(reactor.context(), Signal::Interrupt);
        }
        if reactor.turn(client, Some(Duration::from_millis(1))).unwrap() == Status::Stopped {
            return turn;
        }
    }
    unreachable!("a run is cut off at its deadline")
}

#[test]
fn a_signal_at_any_turn_loses_no_connection_and_ends_the_run() {
    let server = EchoServer::start();
    // Without verification, most of the turns are in the second of probation.
    for (verify, step) in [(true, 1), (false, 101)] {
        for signal_at in (0..).step_by(step) {
            let progress = Progress::Lines;
            let settings = Settings { verify, ..settings(600) };
            let (mut reactor, mut client) =
                client(settings, Ipv4Addr::LOCALHOST, plan(server.port), &progress);
            let turns = run(&mut reactor, &mut client, Some(signal_at));
            let stats = client.into_stats();
            assert_eq!(stats.lost, 0, "verify {verify}, signal at {signal_at}: {stats:?}");
            assert!(stats.held <= stats.peak && stats.verified_passes.len() <= 2, "{stats:?}");
            if turns < signal_at {
                assert_eq!(stats.stop, None, "it has ended before the signal: {stats:?}");
                break;
            }
        }
    }
}

/// Its local port can only be the one that it connects to.
#[test]
fn a_connection_to_itself_is_never_counted() {
    for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
        for (verify, is_unspecified) in [(true, false), (false, false), (true, true)] {
            let Ok(listener) = TcpListener::bind((ip, 0)) else { continue };
            let port = listener.local_addr().unwrap().port();
            drop(listener);
            let target: IpAddr = match ip {
                IpAddr::V4(_) if is_unspecified => Ipv4Addr::UNSPECIFIED.into(),
                IpAddr::V6(_) if is_unspecified => Ipv6Addr::UNSPECIFIED.into(),
                ip => ip,
            };
            let progress = Progress::Lines;
            let settings = Settings { verify, local_ports: Some(port..=port), ..settings(1) };
            let plan = Plan::new(vec![], port, 1, 1);
            let (mut reactor, mut client) = client(settings, target, plan, &progress);
            run(&mut reactor, &mut client, None);
            let stats = client.into_stats();
            assert_eq!((stats.peak, stats.opened, stats.lost), (0, 0, 0), "{target}: {stats:?}");
            assert_eq!(stats.verified().unwrap_or(0), 0, "{target}: {stats:?}");
            assert_eq!(stats.stop, Some(Stop::NothingListens), "{target}: {stats:?}");
            assert!(stats.is_self_connected, "{target}: {stats:?}");
            assert_eq!(stats.failures.by_name()[failures::SELF_CONNECT], 3, "{stats:?}");
        }
    }
}

/// EADDRNOTAVAIL, as if IPv6 is switched off.
#[test]
fn a_machine_without_an_address_does_not_blame_the_ports() {
    let progress = Progress::Lines;
    let plan = Plan::new(vec![Ipv4Addr::new(192, 0, 2, 1).into()], 9900, 3, 28_232);
    let (mut reactor, mut client) = client(settings(5), Ipv4Addr::LOCALHOST, plan, &progress);
    run(&mut reactor, &mut client, None);
    let stats = client.into_stats();
    assert_eq!((stats.stop, stats.attempted), (Some(Stop::NoAddress), 0), "{stats:?}");
}

/// Takes longer than the hold in a turn, and ends the ramp then.
struct SlowTurn<'t, 'a>(&'t mut Client<'a, Echo>);

impl Handler for SlowTurn<'_, '_> {
    type Conn = EchoConn;

    fn on_accept(&mut self, _: &mut Cx<Echo>, _: &Incoming<'_>) -> Option<EchoConn> {
        None
    }

    fn on_data(&mut self, _: &mut Cx<Echo>, _: Token, _: &mut EchoConn, _: &mut [u8]) {}

    fn on_timer(&mut self, cx: &mut Cx<Echo>, _: TimerId) {
        let began = Instant::now();
        while began.elapsed() < self.0.run.settings.hold * 2 {
            std::hint::spin_loop();
        }
        self.0.start(cx);
    }
}

#[test]
fn a_hold_has_the_given_length_whenever_its_turn_began() {
    let progress = Progress::Lines;
    let hold = Duration::from_millis(20);
    // A goal of 0 ends the ramp at once. The held connection is not a new one.
    let settings = Settings { hold, ..settings(0) };
    let (mut reactor, mut client) = client(settings, Ipv4Addr::LOCALHOST, plan(9900), &progress);
    client.run.stats.hold_one();
    arm(reactor.context(), Duration::ZERO).unwrap();
    let began = Instant::now();
    while matches!(client.phase, AnyPhase::Ramp(_)) {
        let _ = reactor.turn(&mut SlowTurn(&mut client), None).unwrap();
    }
    while reactor.turn(&mut client, None).unwrap() == Status::Running {
        assert!(began.elapsed() < DEADLINE, "{client:?}");
    }
    assert!(client.into_stats().hold >= hold);
}

#[test]
fn the_layers_of_a_connection_are_the_sizes_of_their_types() {
    let plain = layers::<Echo>();
    assert_eq!((plain.kernel, plain.tls), (None, 0));
    assert_eq!(plain.protocol, size_of::<<Echo as Protocol>::State>() as u64);
    let conn = size_of::<Conn<<Echo as Protocol>::State>>() as u64;
    assert_eq!(plain.protocol + plain.client, SLOT_BYTES + conn);
    let secure = layers::<Tls<Echo>>();
    assert_eq!(secure.protocol, plain.protocol);
    // A session of rustls takes more than the state around it.
    assert!(secure.tls > 500, "{secure:?}");
}
