//! The broker, under mosquitto's clients, under c1000k-client, and under peers of the test's that speak it byte by byte.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::descriptors::Descriptors;
use crate::{CROWD, Example, expect, expect_gone, foreign, kin, peer, raise_descriptor_limit};

const PACKAGE: &str = "mosquitto-clients";

/// `mosquitto_pub`, to its end, which with QoS 1 comes after the acknowledgement.
fn publish(broker: SocketAddr, args: &[&str]) -> Option<ExitStatus> {
    let (host, port) = (broker.ip().to_string(), broker.port().to_string());
    let args = [&["-h", &host, "-p", &port][..], args].concat();
    foreign("mosquitto_pub", PACKAGE, &args).map(|output| output.status)
}

/// A broker that has a message for whoever has subscribed; `None` where mosquitto's clients are not installed.
fn broker() -> Option<(Example, SocketAddr)> {
    let (example, broker) = Example::listening("mqtt_broker");
    foreign("mosquitto_sub", PACKAGE, &["--help"])?;
    assert!(publish(broker, &["-t", "$ready", "-m", "yes", "-r"])?.success());
    Some((example, broker))
}

/// A `mosquitto_sub` that ends after so many messages, each of which it prints with its topic.
struct Subscriber {
    child: Child,
    lines: BufReader<ChildStdout>,
    /// What came before it was ready.
    printed: String,
}

impl Subscriber {
    /// One whose subscriptions the broker has acknowledged: what is retained for it has come.
    fn start(broker: SocketAddr, messages: usize, args: &[&str]) -> Self {
        let mut child = Command::new("stdbuf")
            .args(["-oL", "mosquitto_sub", "-h", &broker.ip().to_string()])
            .args(["-p", &broker.port().to_string(), "-v", "-C", &(messages + 1).to_string()])
            .args(["-W", "30"])
            .args(args)
            .args(["-t", "$ready"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut printed = String::new();
        while !printed.ends_with("$ready yes\n") {
            assert!(lines.read_line(&mut printed).unwrap() > 0, "it is not ready: {printed}");
        }
        let printed = printed.replace("$ready yes\n", "");
        Self { child, lines, printed }
    }

    /// What it has printed, when it has all.
    fn end(mut self) -> Vec<String> {
        let mut printed = self.printed;
        self.lines.read_to_string(&mut printed).unwrap();
        assert!(self.child.wait().unwrap().success(), "{printed}");
        printed.lines().map(str::to_owned).collect()
    }
}

#[test]
fn mqtt_broker_passes_messages_of_mosquitto_on_by_their_topics() {
    let _descriptors = Descriptors::counted();
    let Some((example, broker)) = broker() else { return };
    let all = [
        ("rooms/7/light", "on", "1"),
        ("rooms/7", "quiet", "0"),
        ("rooms/8/light", "off", "0"),
        ("rooms/8/light/left", "dim", "1"),
        ("$other", "hidden", "1"),
    ];
    let expected: [(&[&str], &[usize]); 5] = [
        (&["-q", "1", "-t", "rooms/+/light"], &[0, 2]),
        (&["-q", "0", "-t", "rooms/7/#"], &[0, 1]),
        (&["-q", "2", "-t", "#"], &[0, 1, 2, 3]),
        (&["-q", "1", "-t", "+/+", "-t", "$other"], &[1, 4]),
        // Each message once, however many of its filters fit.
        (&["-q", "1", "-t", "rooms/8/light", "-t", "rooms/#", "-t", "rooms/+/+"], &[0, 1, 2, 3]),
    ];
    let mut subscribers = Vec::new();
    for (args, indices) in expected {
        let subscriber = Subscriber::start(broker, indices.len(), args);
        subscribers.push((subscriber, indices));
    }
    for (topic, text, qos) in all {
        assert!(publish(broker, &["-t", topic, "-m", text, "-q", qos]).unwrap().success());
    }
    for (subscriber, indices) in subscribers {
        let wanted = indices.iter().map(|&index| format!("{} {}", all[index].0, all[index].1));
        assert_eq!(subscriber.end(), wanted.collect::<Vec<_>>());
    }
    example.terminate();
}

#[test]
fn mqtt_broker_passes_many_and_long_messages_on_in_order() {
    let _descriptors = Descriptors::counted();
    let Some((example, broker)) = broker() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (long, many) = (folder.path().join("long"), folder.path().join("many"));
    std::fs::write(&long, "x".repeat(60_000)).unwrap();
    let lines: Vec<_> = (0..2000).map(|number| format!("message {number}")).collect();
    std::fs::write(&many, lines.join("\n") + "\n").unwrap();
    let subscriber = Subscriber::start(broker, 2001, &["-q", "1", "-t", "t"]);
    let from_file = ["-t", "t", "-q", "1", "-f", long.to_str().unwrap()];
    assert!(publish(broker, &from_file).unwrap().success());
    let (host, port) = (broker.ip().to_string(), broker.port().to_string());
    let from_lines = Command::new("mosquitto_pub")
        .args(["-h", &host, "-p", &port, "-t", "t", "-q", "1", "-l"])
        .stdin(std::fs::File::open(&many).unwrap())
        .status();
    assert!(from_lines.unwrap().success());
    let printed = subscriber.end();
    assert_eq!(printed[0].len(), "t ".len() + 60_000);
    for (printed, line) in printed[1..].iter().zip(&lines) {
        assert_eq!(printed, &format!("t {line}"));
    }
    example.terminate();
}

#[test]
fn mqtt_broker_retains_what_is_small_until_it_is_replaced() {
    let _descriptors = Descriptors::counted();
    let Some((_example, broker)) = broker() else { return };
    let retained = |args: &[&str]| {
        let args = [&["-r", "-q", "1"], args].concat();
        assert!(publish(broker, &args).unwrap().success());
    };
    let large = "x".repeat(5000);
    for (topic, text) in [("a/1", "old"), ("a/1", "new"), ("a/2", "two"), ("a/3", &large)] {
        retained(&["-t", topic, "-m", text]);
    }
    retained(&["-t", "a/2", "-n"]);
    let subscriber = Subscriber::start(broker, 2, &["-t", "a/#"]);
    retained(&["-t", "a/2", "-m", "end"]);
    assert_eq!(subscriber.end(), ["a/1 new", "a/2 end"]);
}

/// The bytes of a CONNECT.
fn connect(name: u8, keep_alive: u8) -> Vec<u8> {
    [b"\x10\x0d\0\x04MQTT\x04\x02\0", &[keep_alive][..], b"\0\x01", &[name]].concat()
}

const ACCEPTED: &[u8] = b"\x20\x02\0\0";
const PING: &[u8] = b"\xc0\0";
const PONG: &[u8] = b"\xd0\0";

fn connected(broker: SocketAddr, name: u8, keep_alive: u8) -> TcpStream {
    let mut client = peer(broker);
    client.write_all(&connect(name, keep_alive)).unwrap();
    expect(&mut client, ACCEPTED);
    client
}

#[test]
fn mqtt_broker_drops_the_silent_after_one_and_a_half_keep_alives() {
    let _descriptors = Descriptors::counted();
    let (_example, broker) = Example::listening("mqtt_broker");
    let began = Instant::now();
    let (mut silent, mut lively) = (connected(broker, b's', 2), connected(broker, b'l', 2));
    let mut without = connected(broker, b'w', 0);
    let pinging = thread::spawn(move || {
        for _ in 0..8 {
            thread::sleep(Duration::from_millis(500));
            lively.write_all(PING).unwrap();
            expect(&mut lively, PONG);
        }
        lively
    });
    expect_gone(&mut silent);
    let gone_after = began.elapsed();
    assert!((3.0..4.0).contains(&gone_after.as_secs_f64()), "{gone_after:?}");
    let mut lively = pinging.join().unwrap();
    expect_gone(&mut lively);
    without.write_all(PING).unwrap();
    expect(&mut without, PONG);
}

#[test]
fn mqtt_broker_gives_a_name_to_who_comes_last_and_turns_strangers_away() {
    let _descriptors = Descriptors::counted();
    let (_example, broker) = Example::listening("mqtt_broker");
    let mut first = connected(broker, b'n', 60);
    let mut second = connected(broker, b'n', 60);
    expect_gone(&mut first);

    for (bytes, answer) in [
        (&b"\x10\x0d\0\x04MQTT\x05\x02\0\x3c\0\x01v"[..], &b"\x20\x02\0\x01"[..]), // version 5
        (b"\x10\x0f\0\x06MQIsdp\x03\x02\0\x3c\0\x01v", b"\x20\x02\0\x01"),
        (b"\x10\x0c\0\x04MQTT\x04\0\0\x3c\0\0", b"\x20\x02\0\x02"), // a session to be kept, for no name
        (PING, b""),                                                // before a CONNECT
        (b"\x10\x02\0\x04", b""),
        (b"\x10\xff\xff\xff\xff", b""),
        (b"GET / HTTP/1.1\r\n\r\n", b""),
    ] {
        let mut stranger = peer(broker);
        stranger.write_all(bytes).unwrap();
        expect(&mut stranger, answer);
        expect_gone(&mut stranger);
    }
    for bytes in [
        &b"\x34\x07\0\x01t\0\x01x!"[..], // QoS 2
        b"\x30\x02\0\0",                 // no topic
        b"\x30\x80\x80\x80\x7f",         // as long as can be
        b"\x82\x02\0\x01",               // no filter
        &connect(b'x', 60),              // twice
        &[b"\x82\x08\0\x01\0\x03a#b\0"[..].to_vec(), PING.to_vec()].concat(), // no filter either
    ] {
        let mut client = connected(broker, b'x', 60);
        client.write_all(bytes).unwrap();
        expect_gone(&mut client);
    }
    // In pieces: one filter that is as deep as can be, and one that is deeper.
    for (levels, answer) in [(32, &b"\x90\x03\0\x01\x01"[..]), (33, b"")] {
        let filter = [&b"a/".repeat(levels - 1)[..], b"a"].concat();
        let length = filter.len() as u8;
        for byte in [&[0x82, length + 5, 0, 1, 0, length], &filter[..], b"\x01"].concat() {
            second.write_all(&[byte]).unwrap();
        }
        expect(&mut second, answer);
    }
    expect_gone(&mut second);
}

#[test]
fn mqtt_broker_reaches_a_crowd_in_the_order_of_publishing() {
    let _descriptors = Descriptors::counted();
    let (example, broker) = Example::listening("mqtt_broker");
    raise_descriptor_limit();
    let mut crowd: Vec<_> = (0..CROWD)
        .map(|number| {
            let mut peer = peer(broker);
            let name = format!("crowd-{number}");
            let length = 12 + name.len() as u8;
            let head = [&b"\x10"[..], &[length], b"\0\x04MQTT\x04\x02\0\0\0"].concat();
            let connect = [&head, &[name.len() as u8][..], name.as_bytes()].concat();
            // Half of them with QoS 1.
            let subscribe = [b"\x82\x08\0\x01\0\x03all", &[(number % 2) as u8][..]].concat();
            peer.write_all(&[connect, subscribe].concat()).unwrap();
            expect(&mut peer, &[ACCEPTED, b"\x90\x03\0\x01", &[(number % 2) as u8]].concat());
            peer
        })
        .collect();
    let mut publisher = connected(broker, b'p', 60);
    let messages: Vec<u8> =
        (0..50).flat_map(|number| [b"\x32\x08\0\x03all\0\x07", &[number][..]].concat()).collect();
    publisher.write_all(&messages).unwrap();
    publisher.write_all(PING).unwrap();
    let acknowledged = b"\x40\x02\0\x07".repeat(50);
    expect(&mut publisher, &[&acknowledged, PONG].concat());
    for (number, peer) in crowd.iter_mut().enumerate() {
        for message in 0..50 {
            let expected = match number % 2 {
                0 => [b"\x30\x06\0\x03all", &[message][..]].concat(),
                _ => [b"\x32\x08\0\x03all\0", &[message + 2, message][..]].concat(),
            };
            expect(peer, &expected);
        }
    }
    example.terminate();
}

#[test]
fn mqtt_broker_holds_and_answers_what_c1000k_client_opens() {
    let _descriptors = Descriptors::counted();
    let (example, broker) = Example::listening("mqtt_broker");
    let Some(client) = kin("c1000k-client") else { return };
    for message in ["", "--message-size 300"] {
        let words = "-c 500 --heartbeat 1s --hold 2s --fail-if lost>0 --fail-if failed>0";
        let output = Command::new(&client)
            .arg(format!("mqtt://{broker}"))
            .args(words.split(' ').chain(message.split_terminator(' ')))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    example.terminate();
}
