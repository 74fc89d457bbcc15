//! MQTT 3.1.1: a session is opened, and its heartbeat is a PINGREQ, or a PUBLISH that the broker acknowledges.
//!
//! The client sends three types of packets and expects three, of two to four bytes each; numbers in brackets are sections
//! of the OASIS standard.

use super::{Answer, Complaint, Protocol, start_of};

/// CONNACK without a session, connection accepted [3.2].
const CONNACK: &[u8] = &[0x20, 2, 0, 0];
/// [3.12]
const PINGREQ: &[u8] = &[0xc0, 0];
/// [3.13]
const PINGRESP: &[u8] = &[0xd0, 0];
/// Any identifier will do, because only one message of a connection is in flight at a time.
const PACKET_ID: [u8; 2] = [0, 1];
/// PUBACK of that packet [3.4].
const PUBACK: &[u8] = &[0x40, 2, 0, 1];

/// Opens a clean session for each connection, without a keep-alive of its own.
#[derive(Clone, Debug)]
pub struct Mqtt {
    /// The prefix of client identifiers and topics, which must be unique to this client.
    prefix: String,
    /// `None`: heartbeats are pings.
    payload: Option<Vec<u8>>,
    complaint: Complaint,
}

/// The expected packet, and the number of its bytes received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MqttState {
    awaited: Awaited,
    matched: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Awaited {
    #[default]
    Nothing,
    Connack,
    Pingresp,
    Puback,
}

impl Awaited {
    fn packet(self) -> &'static [u8] {
        match self {
            Self::Nothing => &[],
            Self::Connack => CONNACK,
            Self::Pingresp => PINGRESP,
            Self::Puback => PUBACK,
        }
    }
}

impl Mqtt {
    /// Its clients are named `c1000k-RUN-NUMBER`; a payload is published to `c1000k/RUN/NUMBER` with QoS 1.
    pub fn new(run: u32, payload: Option<Vec<u8>>) -> Self {
        Self { prefix: format!("c1000k-{run}-"), payload, complaint: Complaint::default() }
    }

    fn publish(&self, number: u32, payload: &[u8], out: &mut Vec<u8>) {
        let topic = format!("{}{number}", self.prefix).replace('-', "/");
        out.push(0x32); // PUBLISH, QoS 1 [3.3]
        write_length(2 + topic.len() + PACKET_ID.len() + payload.len(), out);
        write_text(&topic, out);
        out.extend_from_slice(&PACKET_ID);
        out.extend_from_slice(payload);
    }
}

/// The remaining length: seven bits per byte, the lowest first [2.2.3].
fn write_length(mut length: usize, out: &mut Vec<u8>) {
    while length > 0x7f {
        out.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
}

/// Two bytes of length, then the text [1.5.3].
fn write_text(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&(text.len() as u16).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

impl Protocol for Mqtt {
    type State = MqttState;

    fn state(&self) -> MqttState {
        MqttState::default()
    }

    fn expected(&self) -> &'static str {
        "an MQTT 3.1.1 broker that accepts anonymous clients, and acknowledges pings and messages"
    }

    fn complaint(&self) -> Option<String> {
        self.complaint.text()
    }

    fn open(&self, state: &mut MqttState, number: u32, out: &mut Vec<u8>) {
        *state = MqttState { awaited: Awaited::Connack, matched: 0 };
        let id = format!("{}{number}", self.prefix);
        // CONNECT: protocol level 4, a clean session, no keep-alive [3.1].
        out.push(0x10);
        write_length(10 + 2 + id.len(), out);
        write_text("MQTT", out);
        out.extend_from_slice(&[4, 2, 0, 0]);
        write_text(&id, out);
    }

    fn heartbeat(&self, state: &mut MqttState, number: u32, out: &mut Vec<u8>) {
        let awaited = match &self.payload {
            None => {
                out.extend_from_slice(PINGREQ);
                Awaited::Pingresp
            }
            Some(payload) => {
                self.publish(number, payload, out);
                Awaited::Puback
            }
        };
        *state = MqttState { awaited, matched: 0 };
    }

    fn receive(
        &self,
        state: &mut MqttState,
        _number: u32,
        bytes: &[u8],
        _out: &mut Vec<u8>,
    ) -> Answer {
        let (known, rest) = state.awaited.packet().split_at(usize::from(state.matched));
        if rest.is_empty() || !rest.starts_with(bytes) {
            self.complaint.note(|| match [known, bytes].concat().as_slice() {
                [0x20, 2, _, code, ..] if state.awaited == Awaited::Connack && *code != 0 => {
                    format!("it refused the session with return code {code}")
                }
                all => match all.strip_prefix(state.awaited.packet()) {
                    Some(more) => format!("it sent another packet, {}, unasked", start_of(more)),
                    None => format!("it sent {}", start_of(all)),
                },
            });
            return Answer::Mismatch;
        }
        if bytes.len() == rest.len() {
            *state = MqttState::default();
            return Answer::Complete;
        }
        state.matched += bytes.len() as u8;
        Answer::Partial
    }

    fn has_part(&self, state: &MqttState) -> bool {
        state.matched > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packets_are_those_of_the_standard() {
        let mqtt = Mqtt::new(7, None);
        let (mut state, mut out) = (mqtt.state(), vec![]);
        mqtt.open(&mut state, 42, &mut out);
        assert_eq!(out, b"\x10\x17\x00\x04MQTT\x04\x02\x00\x00\x00\x0bc1000k-7-42");
        let mqtt = Mqtt::new(7, Some(vec![b'x'; 200]));
        out.clear();
        mqtt.heartbeat(&mut state, 42, &mut out);
        assert_eq!(out[..18], *b"\x32\xd7\x01\x00\x0bc1000k/7/42\x00\x01");
        assert_eq!((out.len(), out[18]), (3 + 215, b'x'));
    }

    #[test]
    fn each_packet_has_its_answer_in_any_pieces() {
        for (payload, answer) in [(None, PINGRESP), (Some(vec![1]), PUBACK)] {
            let mqtt = Mqtt::new(7, payload);
            let (mut state, mut out) = (mqtt.state(), vec![]);
            mqtt.open(&mut state, 1, &mut out);
            assert_eq!(mqtt.receive(&mut state, 1, &CONNACK[..1], &mut out), Answer::Partial);
            assert!(mqtt.has_part(&state));
            assert_eq!(mqtt.receive(&mut state, 1, &CONNACK[1..], &mut out), Answer::Complete);
            mqtt.heartbeat(&mut state, 1, &mut out);
            assert_eq!(mqtt.receive(&mut state, 1, answer, &mut out), Answer::Complete);
            assert_eq!(mqtt.receive(&mut state, 1, answer, &mut out), Answer::Mismatch);
        }
    }

    #[test]
    fn a_refusal_is_a_mismatch() {
        let mqtt = Mqtt::new(7, None);
        let (mut state, mut out) = (mqtt.state(), vec![]);
        mqtt.open(&mut state, 1, &mut out);
        let not_authorized = [0x20, 2, 0, 5];
        assert_eq!(mqtt.receive(&mut state, 1, &not_authorized, &mut out), Answer::Mismatch);
    }

    #[test]
    fn the_complaint_is_about_the_packet_that_is_wrong() {
        for (pieces, complaint) in [
            (&[&[0x20, 2, 0, 5][..]][..], "it refused the session with return code 5"),
            (&[&[0x20], &[2, 0, 5]], "it refused the session with return code 5"),
            (&[&[0x20, 2, 0, 0, 0xd0, 0]], "it sent another packet, \"\\xd0\\x00\", unasked"),
            (&[b"HTTP/1.1 400\r\n"], "it sent \"HTTP/1.1 400\""),
        ] {
            let mqtt = Mqtt::new(7, None);
            let (mut state, mut out) = (mqtt.state(), vec![]);
            mqtt.open(&mut state, 1, &mut out);
            let answers = pieces.iter().map(|piece| mqtt.receive(&mut state, 1, piece, &mut out));
            assert_eq!(answers.last(), Some(Answer::Mismatch));
            assert_eq!(mqtt.complaint().as_deref(), Some(complaint));
        }
    }
}
