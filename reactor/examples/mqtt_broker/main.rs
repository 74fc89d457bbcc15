//! An MQTT 3.1.1 broker: `cargo run --example mqtt_broker -- 127.0.0.1:1883`, then
//! `mosquitto_sub -t 'rooms/+/light'` and `mosquitto_pub -t rooms/7/light -m on -q 1 -r`.
//!
//! QoS 0 and 1, wildcards, small retained messages, and the keep-alive, which is one timeout that each packet moves. There
//! are no wills, and a session ends with its connection, also where the client asks for one that is kept.
//!
//! It shows the two ways to reach many: a message for few is written to each at once; one for many goes out by a sweep, in
//! slices, and its publisher is not read from meanwhile, so its messages stay in order and it can't publish faster than
//! they go out. A message is encoded once; QoS 1 puts the number of each receiver's packet in between by `write_vectored`.
//! A receiver that is behind misses what has QoS 0, and is dropped where it would miss what has QoS 1.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use mqtt_proto::v3::{Connack, Connect, ConnectReturnCode, Packet, Publish};
use mqtt_proto::v3::{Suback, Subscribe, Unsubscribe};
use mqtt_proto::{ClientId, Error, Pid, Protocol, QoS, QosPid, TopicFilter, TopicName};
use reactor::{
    CloseReason, Config, Context, Handler, Incoming, ListenOptions, Reactor, Signal, SweepId,
    Token, WriteError, Written,
};

use common::{Failure, address};
use packets::{Message, next_packet};
use topics::{Topics, matches};

#[path = "../common/mod.rs"]
mod common;
mod packets;
mod topics;

const FILTERS_MAX: usize = 64;
/// Messages that a client has not acknowledged.
const UNACKNOWLEDGED_MAX: usize = 16 * 1024;
const RETAINED_MAX: usize = 1024;
const RETAINED_BYTES_MAX: usize = 1024;
/// More receivers than one callback should write to.
const AT_ONCE_MAX: usize = 1000;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

type Cx = Context<Client>;

#[derive(Default)]
struct Broker {
    clients: HashMap<ClientId, Token>,
    topics: Topics,
    retained: HashMap<TopicName, Publish>,
    under_way: HashMap<SweepId, Delivery>,
}

/// A message on its way to many.
struct Delivery {
    message: Message,
    receivers: HashMap<Token, QoS>,
    publisher: Token,
}

/// What a client without subscriptions has is this and its name: no vector holds anything while it is idle.
#[derive(Default)]
struct Client {
    /// `None` until it has sent its CONNECT.
    id: Option<ClientId>,
    keep_alive: u16,
    last_number: Pid,
    /// What its message needs to go out first, or what it is to read: until then no more is taken from it.
    waits_for_sweep: bool,
    waits_for_room: bool,
    input: Vec<u8>,
    filters: Vec<TopicFilter>,
    unacknowledged: VecDeque<Pid>,
}

/// The client has said goodbye, or breaks the rules.
struct Gone;

impl Broker {
    /// Takes the packets that are whole, as far as the client need not wait; says how many bytes they were.
    fn take_all(
        &mut self,
        cx: &mut Cx,
        token: Token,
        client: &mut Client,
        bytes: &[u8],
    ) -> Result<usize, Gone> {
        let mut used = 0;
        while !client.waits_for_sweep && !client.waits_for_room {
            match next_packet(&bytes[used..]) {
                Ok(Some((packet, length))) => {
                    used += length;
                    self.take(cx, token, client, packet)?;
                }
                Ok(None) => break,
                Err(Error::UnexpectedProtocol(_) | Error::InvalidProtocol(..)) => {
                    return Err(refuse(cx, token, ConnectReturnCode::UnacceptableProtocolVersion));
                }
                Err(_) => return Err(Gone),
            }
        }
        Ok(used)
    }

    fn take(
        &mut self,
        cx: &mut Cx,
        token: Token,
        client: &mut Client,
        packet: Packet,
    ) -> Result<(), Gone> {
        match packet {
            Packet::Connect(connect) => return self.connect(cx, token, client, connect),
            _ if client.id.is_none() => return Err(Gone),
            Packet::Publish(publish) => return self.publish(cx, token, client, publish),
            Packet::Puback(pid) => {
                // As a rule it is the first one.
                match client.unacknowledged.front() {
                    Some(&first) if first == pid => drop(client.unacknowledged.pop_front()),
                    _ => client.unacknowledged.retain(|&other| other != pid),
                }
                if client.unacknowledged.is_empty() {
                    client.unacknowledged = VecDeque::new();
                }
            }
            Packet::Subscribe(subscribe) => self.subscribe(cx, token, client, subscribe)?,
            Packet::Unsubscribe(Unsubscribe { pid, topics }) => {
                for filter in topics {
                    self.topics.unsubscribe(&filter, token);
                    client.filters.retain(|other| *other != filter);
                }
                answer(cx, token, client, &Packet::Unsuback(pid))?;
            }
            Packet::Pingreq => answer(cx, token, client, &Packet::Pingresp)?,
            _ => return Err(Gone), // DISCONNECT among them
        }
        Ok(())
    }

    fn connect(
        &mut self,
        cx: &mut Cx,
        token: Token,
        client: &mut Client,
        connect: Connect,
    ) -> Result<(), Gone> {
        if client.id.is_some() {
            return Err(Gone);
        }
        if connect.protocol != Protocol::V311 {
            return Err(refuse(cx, token, ConnectReturnCode::UnacceptableProtocolVersion));
        }
        let id = match &*connect.client_id {
            "" if !connect.clean_session => {
                return Err(refuse(cx, token, ConnectReturnCode::IdentifierRejected));
            }
            "" => format!("nameless-{}", token.to_bits()).into(),
            _ => connect.client_id,
        };
        client.id = Some(Arc::clone(&id));
        client.keep_alive = connect.keep_alive;
        if client.keep_alive == 0 {
            cx.clear_timeout(token);
        }
        if let Some(old) = self.clients.insert(id, token) {
            cx.abort(old);
        }
        let accepted = Connack::new(false, ConnectReturnCode::Accepted);
        answer(cx, token, client, &Packet::Connack(accepted))
    }

    fn publish(
        &mut self,
        cx: &mut Cx,
        token: Token,
        client: &mut Client,
        publish: Publish,
    ) -> Result<(), Gone> {
        if publish.topic_name.is_empty() || matches!(publish.qos_pid, QosPid::Level2(_)) {
            return Err(Gone);
        }
        let pid = publish.qos_pid.pid();
        self.spread(cx, token, client, publish)?;
        pid.map_or(Ok(()), |pid| answer(cx, token, client, &Packet::Puback(pid)))
    }

    fn spread(
        &mut self,
        cx: &mut Cx,
        publisher: Token,
        client: &mut Client,
        mut publish: Publish,
    ) -> Result<(), Gone> {
        if publish.retain {
            self.retained.remove(&publish.topic_name);
            let is_small = (1..=RETAINED_BYTES_MAX).contains(&publish.payload.len());
            if is_small && self.retained.len() < RETAINED_MAX {
                self.retained.insert(publish.topic_name.clone(), publish.clone());
            }
            publish.retain = false; // those who have subscribed before see it as any other
        }
        let receivers = self.topics.subscribers(&publish.topic_name);
        let message = Message::new(publish).map_err(|_| Gone)?;
        if receivers.len() > AT_ONCE_MAX {
            let sweep = cx.sweep_over(receivers.keys().copied().collect()).map_err(|_| Gone)?;
            self.under_way.insert(sweep, Delivery { message, receivers, publisher });
            client.waits_for_sweep = true;
            cx.pause_reads(publisher);
            return Ok(());
        }
        for (token, qos) in receivers {
            let lent = (token == publisher).then_some(&mut *client);
            deliver(cx, &message, (token, qos), lent);
        }
        Ok(())
    }

    fn subscribe(
        &mut self,
        cx: &mut Cx,
        token: Token,
        client: &mut Client,
        Subscribe { pid, topics }: Subscribe,
    ) -> Result<(), Gone> {
        let mut codes = Vec::new();
        for (filter, qos) in &topics {
            let qos = QoS::Level1.min(*qos);
            client.filters.retain(|other| other != filter);
            // Too many or too deep: mqtt-proto writes a wrong code for a refusal, so there is none.
            if client.filters.len() >= FILTERS_MAX || !self.topics.subscribe(filter, token, qos) {
                return Err(Gone);
            }
            client.filters.push(filter.clone());
            codes.push(qos.into());
        }
        answer(cx, token, client, &Packet::Suback(Suback::new(pid, codes)))?;
        for (filter, qos) in topics {
            for publish in self.retained.values().filter(|one| matches(&filter, &one.topic_name)) {
                let message = Message::new(publish.clone()).map_err(|_| Gone)?;
                deliver(cx, &message, (token, qos), Some(&mut *client));
            }
        }
        Ok(())
    }

    /// More has come, or what the client waited for has happened.
    fn go_on(&mut self, cx: &mut Cx, token: Token, client: &mut Client, bytes: &[u8]) {
        let mut input = mem::take(&mut client.input);
        input.extend_from_slice(bytes);
        let Ok(used) = self.take_all(cx, token, client, &input) else { return cx.close(token) };
        if used < input.len() {
            client.input = input.split_off(used);
        }
        // One and a half times of what was agreed, as the standard has it, after each packet and after a wait.
        if client.keep_alive > 0 && (used > 0 || bytes.is_empty()) {
            cx.set_timeout(token, Duration::from_millis(u64::from(client.keep_alive) * 1500));
        }
        if !client.waits_for_sweep && !client.waits_for_room {
            cx.resume_reads(token);
        }
    }
}

impl Client {
    /// Its number for a message, which it acknowledges by that.
    fn next_number(&mut self) -> Option<Pid> {
        self.last_number += 1;
        // The numbers between the first and the last are in use, or were.
        let is_used = self.unacknowledged.front() == Some(&self.last_number);
        if is_used || self.unacknowledged.len() >= UNACKNOWLEDGED_MAX {
            return None;
        }
        self.unacknowledged.push_back(self.last_number);
        Some(self.last_number)
    }
}

/// Sends a message to a receiver, whose state may be lent to this callback or lie in its slot.
fn deliver(cx: &mut Cx, message: &Message, (token, qos): (Token, QoS), lent: Option<&mut Client>) {
    let Some(client) = lent.or_else(|| cx.conn_mut(token)) else { return };
    let number = match qos {
        QoS::Level0 => None,
        _ if !message.is_numbered() => None,
        _ => match client.next_number() {
            None => return cx.abort(token), // too far behind
            number => number,
        },
    };
    match message.send(cx, token, number) {
        Ok(_) => {}
        // Nothing of it was sent, so the next packet is in step.
        Err(WriteError::Full | WriteError::FullInTotal) if number.is_none() => {}
        Err(_) => cx.abort(token),
    }
}

fn answer(cx: &mut Cx, token: Token, client: &mut Client, packet: &Packet) -> Result<(), Gone> {
    let bytes = packet.encode().map_err(|_| Gone)?;
    match cx.write(token, bytes.as_ref()) {
        Ok(Written::Sent) | Err(WriteError::Closed) => Ok(()),
        Ok(Written::Queued) => {
            client.waits_for_room = true;
            cx.pause_reads(token);
            Ok(())
        }
        Err(_) => Err(Gone),
    }
}

/// Turns a client away with the reason.
fn refuse(cx: &mut Cx, token: Token, code: ConnectReturnCode) -> Gone {
    if let Ok(refusal) = Packet::Connack(Connack::new(false, code)).encode() {
        // The close tells it too.
        let _ = cx.write(token, refusal.as_ref());
    }
    Gone
}

impl Handler for Broker {
    type Conn = Client;

    fn on_accept(&mut self, _cx: &mut Cx, _incoming: &Incoming<'_>) -> Option<Client> {
        Some(Client::default())
    }

    fn on_open(&mut self, cx: &mut Cx, token: Token, _client: &mut Client) {
        cx.set_timeout(token, CONNECT_TIMEOUT);
    }

    fn on_data(&mut self, cx: &mut Cx, token: Token, client: &mut Client, bytes: &mut [u8]) {
        self.go_on(cx, token, client, bytes);
    }

    fn on_drain(&mut self, cx: &mut Cx, token: Token, client: &mut Client) {
        if mem::take(&mut client.waits_for_room) {
            self.go_on(cx, token, client, &[]);
        }
    }

    fn on_timeout(&mut self, cx: &mut Cx, token: Token, _client: &mut Client) {
        cx.abort(token);
    }

    fn on_visit(&mut self, cx: &mut Cx, sweep: SweepId, token: Token, client: &mut Client) {
        let Some(delivery) = self.under_way.get(&sweep) else { return };
        let Some(&qos) = delivery.receivers.get(&token) else { return };
        deliver(cx, &delivery.message, (token, qos), Some(client));
    }

    fn on_swept(&mut self, cx: &mut Cx, sweep: SweepId) {
        let Some(Delivery { publisher, .. }) = self.under_way.remove(&sweep) else { return };
        let Some(conn) = cx.conn_mut(publisher) else { return };
        // Out of its slot, as it would be lent to a callback of its own.
        let mut client = mem::take(conn);
        client.waits_for_sweep = false;
        self.go_on(cx, publisher, &mut client, &[]);
        if let Some(conn) = cx.conn_mut(publisher) {
            *conn = client;
        }
    }

    fn on_close(&mut self, _cx: &mut Cx, token: Token, client: Client, _reason: CloseReason) {
        for filter in &client.filters {
            self.topics.unsubscribe(filter, token);
        }
        if let Some(id) = client.id
            && self.clients.get(&id) == Some(&token)
        {
            self.clients.remove(&id);
        }
    }
}

fn main() -> Result<(), Failure> {
    let argument = std::env::args().nth(1).unwrap_or("127.0.0.1:1883".to_owned());
    let mut reactor = Reactor::new(&Config::default())?;
    let cx = reactor.context();
    let listener = cx.listen(address(&argument), &ListenOptions::default())?;
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    println!("listening on {}", cx.listener_addr(listener)?);
    reactor.run(&mut Broker::default())?;
    Ok(())
}
