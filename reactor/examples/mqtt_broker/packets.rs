//! Packets, as they come out of a stream of bytes and as they go to many.

use std::io::IoSlice;
use std::sync::Arc;

use mqtt_proto::v3::{Header, Packet, Publish};
use mqtt_proto::{Error, Pid, QosPid, total_len};
use reactor::{Context, Token, WriteError, Written};

const PACKET_BYTES_MAX: usize = 64 * 1024;

/// A message as it is sent.
pub(crate) struct Message {
    at_most_once: Arc<[u8]>,
    /// Where it has QoS 1, and the place of the packet's number in it.
    at_least_once: Option<(Vec<u8>, usize)>,
}

impl Message {
    pub(crate) fn new(mut publish: Publish) -> Result<Self, Error> {
        let topic_bytes = 2 + publish.topic_name.len();
        publish.dup = false;
        let numbered = match publish.qos_pid {
            QosPid::Level0 => None,
            _ => Some(Packet::Publish(publish.clone()).encode()?.as_ref().to_vec()),
        };
        publish.qos_pid = QosPid::Level0;
        let at_most_once = Packet::Publish(publish).encode()?.as_ref().into();
        let at_least_once = numbered.map(|bytes| {
            // After the first byte, the length in as many as it takes, and the topic.
            let length_bytes = bytes[1..].iter().take_while(|&&byte| byte >= 128).count() + 1;
            (bytes, 1 + length_bytes + topic_bytes)
        });
        Ok(Self { at_most_once, at_least_once })
    }

    /// Whether it has a number for each receiver that wants it with QoS 1.
    pub(crate) fn is_numbered(&self) -> bool {
        self.at_least_once.is_some()
    }

    /// Sends it to a receiver: with QoS 1 where there is a number.
    pub(crate) fn send<C>(
        &self,
        cx: &mut Context<C>,
        token: Token,
        number: Option<Pid>,
    ) -> Result<Written, WriteError> {
        match (number, &self.at_least_once) {
            (Some(number), Some((bytes, at))) => {
                let number = number.value().to_be_bytes();
                let parts = [&bytes[..*at], &number, &bytes[at + 2..]];
                cx.write_vectored(token, &parts.map(IoSlice::new))
            }
            _ => Ok(cx.write_chunk(token, Arc::clone(&self.at_most_once))?),
        }
    }
}

/// The first packet, if it is whole, and its length.
pub(crate) fn next_packet(bytes: &[u8]) -> Result<Option<(Packet, usize)>, Error> {
    let header = match Header::decode(bytes) {
        Err(error) if error.is_eof() => return Ok(None),
        header => header?,
    };
    let length = total_len(header.remaining_len as usize)?;
    if length > PACKET_BYTES_MAX {
        return Err(Error::InvalidRemainingLength);
    }
    let Some(bytes) = bytes.get(..length) else { return Ok(None) };
    // It is all there, so one that wants more contradicts itself.
    let packet = Packet::decode(bytes)?.ok_or(Error::InvalidRemainingLength)?;
    Ok(Some((packet, length)))
}
