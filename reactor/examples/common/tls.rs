//! TLS for a server, by rustls' unbuffered interface: a session keeps no buffers, so an idle connection is small.

use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus,
};

/// What a session says of the bytes that came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It goes on.
    More,
    /// The peer has closed the session (close_notify); it may leave TCP open for as long as it likes.
    Closed,
}

/// A session, and the part of a record that has come so far.
pub(crate) struct Session {
    tls: Box<UnbufferedServerConnection>,
    partial: Vec<u8>,
}

impl Session {
    pub(crate) fn new(tls: UnbufferedServerConnection) -> Self {
        Self { tls: Box::new(tls), partial: Vec::new() }
    }

    /// Takes in what has arrived: plain text is added to `plain`, and what has to be sent to `out`, also where it fails:
    /// the peer gets the alert.
    pub(crate) fn receive(
        &mut self,
        bytes: &mut [u8],
        plain: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> Result<Heard, rustls::Error> {
        if self.partial.is_empty() {
            // As a rule whole records come in, and are decrypted in the buffer of all reads.
            let used = self.process(bytes, plain, out)?;
            self.partial.extend_from_slice(&bytes[used.0..]);
            return Ok(used.1);
        }
        self.partial.extend_from_slice(bytes);
        let mut partial = std::mem::take(&mut self.partial);
        let (used, heard) = self.process(&mut partial, plain, out)?;
        if used < partial.len() {
            partial.drain(..used);
            self.partial = partial;
        }
        Ok(heard)
    }

    fn process(
        &mut self,
        bytes: &mut [u8],
        plain: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> Result<(usize, Heard), rustls::Error> {
        let (mut used, mut heard) = (0, Heard::More);
        loop {
            let UnbufferedStatus { mut discard, state, .. } =
                self.tls.process_tls_records(&mut bytes[used..]);
            let mut is_over = false;
            match state? {
                ConnectionState::EncodeTlsData(mut data) => {
                    append(out, |room| data.encode(room).map_err(encode_room));
                }
                ConnectionState::TransmitTlsData(data) => data.done(),
                ConnectionState::ReadTraffic(mut traffic) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record?;
                        discard += record.discard;
                        plain.extend_from_slice(record.payload);
                    }
                }
                ConnectionState::PeerClosed => heard = Heard::Closed,
                ConnectionState::Closed => (heard, is_over) = (Heard::Closed, true),
                // Early data is not asked for.
                _ => is_over = true,
            }
            used += discard;
            if is_over {
                return Ok((used, heard));
            }
        }
    }

    /// Adds a record with these bytes to `out`; says whether the session takes any now.
    pub(crate) fn send(&mut self, plain: &[u8], out: &mut Vec<u8>) -> bool {
        match self.tls.process_tls_records(&mut []).state {
            Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                append(out, |room| traffic.encrypt(plain, room).map_err(encrypt_room))
            }
            _ => false,
        }
    }

    /// Says goodbye.
    pub(crate) fn close(&mut self, out: &mut Vec<u8>) {
        if let Ok(ConnectionState::WriteTraffic(mut traffic)) =
            self.tls.process_tls_records(&mut []).state
        {
            append(out, |room| traffic.queue_close_notify(room).map_err(encrypt_room));
        }
    }
}

/// How much more room is wanted; 0 where it can't be done at all.
fn encode_room(error: EncodeError) -> usize {
    match error {
        EncodeError::InsufficientSize(InsufficientSizeError { required_size }) => required_size,
        EncodeError::AlreadyEncoded => 0,
    }
}

fn encrypt_room(error: EncryptError) -> usize {
    match error {
        EncryptError::InsufficientSize(InsufficientSizeError { required_size }) => required_size,
        EncryptError::EncryptExhausted => 0,
    }
}

/// Has something written at the end of `out`, which gets as much room as that wants; says whether it was written.
fn append(out: &mut Vec<u8>, mut write: impl FnMut(&mut [u8]) -> Result<usize, usize>) -> bool {
    let (begin, mut room) = (out.len(), 0);
    loop {
        out.resize(begin + room, 0);
        match write(&mut out[begin..]) {
            Ok(written) => {
                out.truncate(begin + written);
                return true;
            }
            Err(wanted) if wanted > room => room = wanted,
            Err(_) => {
                out.truncate(begin);
                return false;
            }
        }
    }
}
