//! TLS for a server, with rustls's unbuffered interface: a session has no buffers, so an idle connection is small.

use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus,
};

/// The state of a session after input was processed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SessionState {
    /// The session is open.
    Open,
    /// The peer has closed the session (close_notify); its TCP stream may still be open.
    Closed,
}

/// A session and an incomplete record, which must be passed to each call of rustls.
pub(crate) struct Session {
    tls: Box<UnbufferedServerConnection>,
    partial: Vec<u8>,
}

impl Session {
    pub(crate) fn new(tls: UnbufferedServerConnection) -> Self {
        Self { tls: Box::new(tls), partial: Vec::new() }
    }

    /// Processes input: appends plain text to `plain`, and records to be sent to `out`.
    pub(crate) fn receive(
        &mut self,
        bytes: &mut [u8],
        plain: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> Result<SessionState, rustls::Error> {
        if self.partial.is_empty() {
            // Input is usually complete records, which are decrypted in the reactor's read buffer.
            let used = self.process(bytes, plain, out)?;
            self.partial.extend_from_slice(&bytes[used.0..]);
            return Ok(used.1);
        }
        self.partial.extend_from_slice(bytes);
        let mut partial = std::mem::take(&mut self.partial);
        let (used, after) = self.process(&mut partial, plain, out)?;
        if used < partial.len() {
            partial.drain(..used);
            self.partial = partial;
        }
        Ok(after)
    }

    fn process(
        &mut self,
        bytes: &mut [u8],
        plain: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> Result<(usize, SessionState), rustls::Error> {
        let (mut used, mut after) = (0, SessionState::Open);
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
                ConnectionState::PeerClosed => after = SessionState::Closed,
                ConnectionState::Closed => (after, is_over) = (SessionState::Closed, true),
                // Early data is not enabled.
                _ => is_over = true,
            }
            used += discard;
            if is_over {
                return Ok((used, after));
            }
        }
    }

    /// Appends a record with these bytes to `out`; returns `false` if the session can't send now.
    pub(crate) fn send(&mut self, plain: &[u8], out: &mut Vec<u8>) -> bool {
        match self.tls.process_tls_records(&mut self.partial).state {
            Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                append(out, |room| traffic.encrypt(plain, room).map_err(encrypt_room))
            }
            _ => false,
        }
    }

    /// Appends a close_notify to `out`.
    pub(crate) fn close(&mut self, out: &mut Vec<u8>) {
        if let Ok(ConnectionState::WriteTraffic(mut traffic)) =
            self.tls.process_tls_records(&mut self.partial).state
        {
            append(out, |room| traffic.queue_close_notify(room).map_err(encrypt_room));
        }
    }
}

/// The buffer size that is needed, or 0 if encoding can't succeed.
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

/// Calls `write` with room at the end of `out`, and again with the room that it asks for. Returns whether it succeeded.
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
