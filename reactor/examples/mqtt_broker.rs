//! An MQTT 3.1.1 broker with QoS 0 and 1, wildcards, retained messages and keep-alive, without persistent sessions.
//!
//! ```sh
//! cargo run --release --example mqtt_broker -- 127.0.0.1:1883
//! mosquitto_sub -t 'rooms/+/temperature' -q 1 &
//! mosquitto_pub -t rooms/kitchen/temperature -m 21 -q 1
//! ```
//!
//! A publication is a sweep over its subscribers: it delays other connections by one slice at most, however many
//! subscribers there are.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use mqttbytes::v4::{
    ConnAck, ConnectReturnCode, Packet, PingResp, PubAck, Publish, SubAck, Subscribe,
    SubscribeReasonCode, UnsubAck, read,
};
use mqttbytes::{Error as MqttError, QoS, has_wildcards, matches, valid_filter};
use reactor::{
    CloseReason, Config, Context, Handler, Incoming, ListenOptions, Reactor, Signal, SweepId, Token,
};

use common::{Failure, address};

mod common;

/// The time within which a client must send its CONNECT.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
const PACKET_BYTES_MAX: usize = 64 * 1024;
const FILTERS_MAX: usize = 64;

#[derive(Default)]
struct Broker {
    /// Connections by client identifier.
    clients: HashMap<String, Token>,
    /// Subscriptions by filter, with the granted QoS.
    subscribers: BTreeMap<Arc<str>, HashMap<Token, QoS>>,
    retained: BTreeMap<String, Publish>,
    /// The publication of each sweep.
    publications: Vec<(SweepId, Publish)>,
    /// The packets to be sent by the next `flush`.
    out: BytesMut,
}

#[derive(Default)]
struct Conn {
    /// An incomplete packet.
    input: BytesMut,
    /// `None` before its CONNECT.
    client: Option<Box<Client>>,
}

struct Client {
    id: String,
    keep_alive: Option<Duration>,
    filters: Vec<Arc<str>>,
    last_packet: u16,
}

/// The client has disconnected, or has violated the protocol.
struct Disconnect;

impl Broker {
    fn on_packet(
        &mut self,
        cx: &mut Context<Conn>,
        token: Token,
        conn: &mut Conn,
        packet: Packet,
    ) -> Result<(), Disconnect> {
        let Some(client) = &mut conn.client else {
            let Packet::Connect(connect) = packet else { return Err(Disconnect) };
            // A new connection with the same client identifier ends the old one.
            let known = (!connect.client_id.is_empty())
                .then(|| self.clients.insert(connect.client_id.clone(), token));
            if let Some(Some(old)) = known {
                cx.abort(old);
            }
            let keep_alive = Duration::from_secs(connect.keep_alive.into()) * 3 / 2;
            conn.client = Some(Box::new(Client {
                id: connect.client_id,
                keep_alive: (!keep_alive.is_zero()).then_some(keep_alive),
                filters: Vec::new(),
                last_packet: 0,
            }));
            return written(ConnAck::new(ConnectReturnCode::Success, false).write(&mut self.out));
        };
        match packet {
            Packet::Publish(publish) if publish.qos != QoS::ExactlyOnce => {
                if has_wildcards(&publish.topic) {
                    return Err(Disconnect);
                }
                if publish.qos == QoS::AtLeastOnce {
                    written(PubAck::new(publish.pkid).write(&mut self.out))?;
                }
                self.publish(cx, publish);
                Ok(())
            }
            Packet::Subscribe(subscribe) => self.subscribe(token, client, &subscribe),
            Packet::Unsubscribe(unsubscribe) => {
                for filter in &unsubscribe.topics {
                    client.filters.retain(|own| **own != **filter);
                    self.forget(filter, token);
                }
                written(UnsubAck::new(unsubscribe.pkid).write(&mut self.out))
            }
            Packet::PingReq => written(PingResp.write(&mut self.out)),
            Packet::PubAck(_) => Ok(()),
            _ => Err(Disconnect),
        }
    }

    fn subscribe(
        &mut self,
        token: Token,
        client: &mut Client,
        subscribe: &Subscribe,
    ) -> Result<(), Disconnect> {
        let mut codes = Vec::new();
        let mut granted = Vec::new();
        for wish in &subscribe.filters {
            let path = wish.path.as_str();
            if !valid_filter(path) || client.filters.len() >= FILTERS_MAX {
                codes.push(SubscribeReasonCode::Failure);
                continue;
            }
            let qos = if wish.qos == QoS::AtMostOnce { QoS::AtMostOnce } else { QoS::AtLeastOnce };
            let filter: Arc<str> = path.into();
            if !client.filters.contains(&filter) {
                client.filters.push(Arc::clone(&filter));
            }
            self.subscribers.entry(filter).or_default().insert(token, qos);
            codes.push(SubscribeReasonCode::Success(qos));
            granted.push((path, qos));
        }
        written(SubAck::new(subscribe.pkid, codes).write(&mut self.out))?;
        for (path, qos) in granted {
            for (topic, publish) in &self.retained {
                if matches(topic, path) {
                    let mut publish = publish.clone();
                    publish.retain = true;
                    written(deliver(&mut publish, qos, client, &mut self.out))?;
                }
            }
        }
        Ok(())
    }

    fn publish(&mut self, cx: &mut Context<Conn>, publish: Publish) {
        if publish.retain && publish.payload.is_empty() {
            self.retained.remove(&publish.topic);
        } else if publish.retain {
            self.retained.insert(publish.topic.clone(), publish.clone());
        }
        let mut tokens: Vec<Token> =
            self.subscribers_of(&publish.topic).map(|(token, _)| token).collect();
        tokens.sort_unstable();
        tokens.dedup();
        if let Ok(sweep) = cx.sweep_of(tokens) {
            self.publications.push((sweep, publish));
        }
    }

    fn subscribers_of(&self, topic: &str) -> impl Iterator<Item = (Token, QoS)> {
        let fits = |filter: &str| matches(topic, filter);
        let filters = self.subscribers.iter().filter(move |(filter, _)| fits(filter));
        filters.flat_map(|(_, tokens)| tokens.iter().map(|(&token, &qos)| (token, qos)))
    }

    fn forget(&mut self, filter: &str, token: Token) {
        if let Some(tokens) = self.subscribers.get_mut(filter) {
            tokens.remove(&token);
            if tokens.is_empty() {
                self.subscribers.remove(filter);
            }
        }
    }

    /// Sends the collected packets; aborts the connection if they don't fit into its queue.
    fn flush(&mut self, cx: &mut Context<Conn>, token: Token) {
        if !self.out.is_empty() && cx.write(token, &self.out).is_err() {
            cx.abort(token);
        }
        self.out.clear();
    }
}

impl Handler for Broker {
    type Conn = Conn;

    fn on_accept(&mut self, _cx: &mut Context<Conn>, _incoming: &Incoming<'_>) -> Option<Conn> {
        Some(Conn::default())
    }

    fn on_open(&mut self, cx: &mut Context<Conn>, token: Token, _conn: &mut Conn) {
        cx.set_timeout(token, CONNECT_WITHIN);
    }

    fn on_data(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn, bytes: &mut [u8]) {
        let mut input = std::mem::take(&mut conn.input);
        input.extend_from_slice(bytes);
        let mut served = Ok(());
        while served.is_ok() && !input.is_empty() {
            served = match read(&mut input, PACKET_BYTES_MAX) {
                Ok(packet) => self.on_packet(cx, token, conn, packet),
                Err(MqttError::InsufficientBytes(_)) => break,
                Err(_) => Err(Disconnect),
            };
        }
        if !input.is_empty() {
            conn.input = input;
        }
        self.flush(cx, token);
        match (served, conn.client.as_ref().map(|client| client.keep_alive)) {
            (Err(Disconnect), _) => cx.close(token),
            (Ok(()), Some(Some(keep_alive))) => cx.set_timeout(token, keep_alive),
            (Ok(()), Some(None)) => cx.clear_timeout(token),
            (Ok(()), None) => {}
        }
    }

    fn on_visit(&mut self, cx: &mut Context<Conn>, sweep: SweepId, token: Token, conn: &mut Conn) {
        let publication = self.publications.iter().find(|(id, _)| *id == sweep);
        let (Some((_, publish)), Some(client)) = (publication, &mut conn.client) else { return };
        let qos = self.subscribers_of(&publish.topic).filter(|(other, _)| *other == token);
        let Some(qos) = qos.map(|(_, qos)| qos).max_by_key(|&qos| qos as u8) else { return };
        let mut publish = publish.clone();
        publish.retain = false;
        if deliver(&mut publish, qos, client, &mut self.out).is_ok() {
            self.flush(cx, token);
        }
    }

    fn on_swept(&mut self, _cx: &mut Context<Conn>, sweep: SweepId) {
        self.publications.retain(|(id, _)| *id != sweep);
    }

    fn on_close(&mut self, _cx: &mut Context<Conn>, token: Token, conn: Conn, _why: CloseReason) {
        let Some(client) = conn.client else { return };
        for filter in &client.filters {
            self.forget(filter, token);
        }
        if self.clients.get(&client.id) == Some(&token) {
            self.clients.remove(&client.id);
        }
    }
}

/// Uses the lower QoS of the publication and the subscription.
fn deliver(
    publish: &mut Publish,
    granted: QoS,
    client: &mut Client,
    out: &mut BytesMut,
) -> Result<usize, MqttError> {
    if granted == QoS::AtMostOnce {
        publish.qos = QoS::AtMostOnce;
    }
    publish.dup = false;
    if publish.qos == QoS::AtLeastOnce {
        client.last_packet = client.last_packet.checked_add(1).unwrap_or(1);
        publish.pkid = client.last_packet;
    }
    publish.write(out)
}

fn written(written: Result<usize, MqttError>) -> Result<(), Disconnect> {
    written.map(|_| ()).map_err(|_| Disconnect)
}

fn main() -> Result<(), Failure> {
    let listen = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:1883".to_owned());
    let mut reactor = Reactor::new(&Config::default())?;
    let cx = reactor.context();
    let listener = cx.listen(address(&listen), &ListenOptions::default())?;
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    println!("listening on {}", cx.listener_addr(listener)?);
    reactor.run(&mut Broker::default())?;
    Ok(())
}
