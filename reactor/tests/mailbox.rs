//! Messages from other threads, and several reactors side by side.

#![expect(clippy::unwrap_used, reason = "a test reports errors by panicking")]

mod common;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{self, TrySendError};
use std::thread;
use std::time::{Duration, Instant};

use reactor::{
    Config, Context, Handler, Incoming, ListenOptions, Mailbox, Reactor, Sender, Status, Token,
};

use common::descriptors::Descriptors;

const DEADLINE: Duration = Duration::from_secs(20);

/// Records messages, and the number of them per wake-up.
struct Post {
    mailbox: Mailbox<u64>,
    messages: Vec<u64>,
    wakes: Vec<usize>,
}

impl Handler for Post {
    type Conn = ();

    fn on_accept(&mut self, _: &mut Context<()>, _: &Incoming<'_>) -> Option<()> {
        None
    }

    fn on_data(&mut self, _: &mut Context<()>, _: Token, _: &mut (), _: &mut [u8]) {}

    fn on_wake(&mut self, _: &mut Context<()>) {
        let before = self.messages.len();
        while let Some(message) = self.mailbox.receive() {
            self.messages.push(message);
        }
        self.wakes.push(self.messages.len() - before);
    }
}

fn small() -> Config {
    Config { connections_max: 64, ..Config::default() }
}

fn post(capacity: usize) -> (Reactor<()>, Sender<u64>, Post) {
    let mut reactor = Reactor::new(&small()).unwrap();
    let (sender, mailbox) = reactor.context().mailbox(capacity);
    (reactor, sender, Post { mailbox, messages: Vec::new(), wakes: Vec::new() })
}

fn turn(reactor: &mut Reactor<()>, post: &mut Post, max_wait: Duration) {
    assert_eq!(reactor.turn(post, Some(max_wait)).unwrap(), Status::Running);
}

#[test]
fn many_messages_make_one_wake_up() {
    let _descriptors = Descriptors::counted();
    let (mut reactor, sender, mut post) = post(100);
    for message in 0..100 {
        sender.send(message).unwrap();
    }
    turn(&mut reactor, &mut post, DEADLINE);
    assert_eq!(post.wakes, [100]);
    assert_eq!(post.messages, Vec::from_iter(0..100));
    turn(&mut reactor, &mut post, Duration::ZERO);
    assert_eq!(post.wakes, [100], "a wake-up without a message");

    sender.send(100).unwrap();
    turn(&mut reactor, &mut post, DEADLINE);
    assert_eq!(post.wakes, [100, 1]);
}

#[test]
fn a_full_mailbox_returns_the_message_and_accepts_more_after_it_is_emptied() {
    let _descriptors = Descriptors::counted();
    let (mut reactor, sender, mut post) = post(2);
    sender.send(1).unwrap();
    sender.send(2).unwrap();
    assert!(matches!(sender.send(3), Err(TrySendError::Full(3))));
    turn(&mut reactor, &mut post, DEADLINE);
    sender.send(3).unwrap();
    turn(&mut reactor, &mut post, DEADLINE);
    assert_eq!(post.messages, [1, 2, 3]);
}

#[test]
fn a_send_to_a_dropped_mailbox_returns_the_message() {
    let _descriptors = Descriptors::counted();
    let (reactor, sender, post) = post(2);
    drop((reactor, post));
    assert!(matches!(sender.send(7), Err(TrySendError::Disconnected(7))));
}

#[test]
fn one_wake_up_delivers_a_bounded_number_and_the_rest_follows() {
    let _descriptors = Descriptors::counted();
    let (mut reactor, sender, mut post) = post(3000);
    for message in 0..3000 {
        sender.send(message).unwrap();
    }
    for _ in 0..3 {
        turn(&mut reactor, &mut post, DEADLINE);
    }
    assert_eq!(post.wakes, [1024, 1024, 952]);
    assert_eq!(post.messages, Vec::from_iter(0..3000));
}

#[test]
fn no_message_of_several_threads_is_lost_or_reordered() {
    let _descriptors = Descriptors::counted();
    const THREADS: u64 = 4;
    const EACH: u64 = 20_000;
    let (mut reactor, sender, mut post) = post(64);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let sender = sender.clone();
            scope.spawn(move || {
                for number in 0..EACH {
                    let mut message = thread * EACH + number;
                    while let Err(TrySendError::Full(back)) = sender.send(message) {
                        message = back;
                        thread::yield_now();
                    }
                }
            });
        }
        let deadline = Instant::now() + DEADLINE;
        while (post.messages.len() as u64) < THREADS * EACH {
            assert!(Instant::now() < deadline, "only {} messages arrived", post.messages.len());
            turn(&mut reactor, &mut post, Duration::from_secs(1));
        }
    });
    for thread in 0..THREADS {
        let of_thread = post.messages.iter().copied().filter(|message| message / EACH == thread);
        assert!(of_thread.eq(thread * EACH..(thread + 1) * EACH), "thread {thread} was reordered");
    }
}

/// A command to the thread of a reactor.
enum Command {
    Stop,
}

/// Sends each peer the number of its reactor.
struct Shard {
    number: u8,
    mailbox: Mailbox<Command>,
}

impl Handler for Shard {
    type Conn = ();

    fn on_accept(&mut self, _: &mut Context<()>, _: &Incoming<'_>) -> Option<()> {
        Some(())
    }

    fn on_data(&mut self, cx: &mut Context<()>, token: Token, _: &mut (), _: &mut [u8]) {
        cx.write(token, &[self.number]).unwrap();
    }

    fn on_wake(&mut self, cx: &mut Context<()>) {
        while let Some(Command::Stop) = self.mailbox.receive() {
            cx.shutdown(DEADLINE);
        }
    }
}

/// A reactor with its own listener on the shared address.
fn shard(number: u8, address: SocketAddr) -> (Reactor<()>, SocketAddr, Sender<Command>, Shard) {
    let mut reactor = Reactor::new(&small()).unwrap();
    let cx = reactor.context();
    let options = ListenOptions { reuse_port: true, ..ListenOptions::default() };
    let listener = cx.listen(address, &options).unwrap();
    let address = cx.listener_addr(listener).unwrap();
    let (sender, mailbox) = cx.mailbox(1);
    (reactor, address, sender, Shard { number, mailbox })
}

fn ask(address: SocketAddr) -> u8 {
    let mut peer = TcpStream::connect_timeout(&address, DEADLINE).unwrap();
    peer.set_read_timeout(Some(DEADLINE)).unwrap();
    peer.write_all(b"?").unwrap();
    let mut number = [0];
    peer.read_exact(&mut number).unwrap();
    number[0]
}

#[test]
fn reactors_of_several_threads_share_a_port_and_stop_on_a_message() {
    let _descriptors = Descriptors::counted();
    const SHARDS: u8 = 3;
    let mut address = "127.0.0.1:0".parse().unwrap();
    let mut threads = Vec::new();
    let mut senders = Vec::new();
    let (done, all_done) = mpsc::channel();
    for number in 0..SHARDS {
        let (mut reactor, bound, sender, mut shard) = shard(number, address);
        address = bound;
        senders.push(sender);
        let done = done.clone();
        threads.push(thread::spawn(move || {
            reactor.run(&mut shard).unwrap();
            done.send(reactor.context().stats().accepted).unwrap();
        }));
    }

    // The kernel distributes by a hash of the 5-tuple: a reactor gets none with a probability of 3 * (2/3)^200.
    const PEERS: u64 = 200;
    let answers: BTreeSet<u8> = (0..PEERS).map(|_| ask(address)).collect();
    assert_eq!(answers, BTreeSet::from_iter(0..SHARDS));

    for sender in &senders {
        sender.send(Command::Stop).unwrap();
    }
    let accepted: u64 =
        (0..SHARDS).map(|_| all_done.recv_timeout(DEADLINE).expect("each reactor stops")).sum();
    assert_eq!(accepted, PEERS);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}
