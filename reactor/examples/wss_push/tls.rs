//! A TLS session that needs nothing of the connection but its bytes, and keeps none of them: what has arrived is decrypted
//! where it lies, and only the beginning of a record that is not whole is copied and kept.

use std::mem;
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus, WriteTraffic,
};
use rustls::{Error, ServerConfig};

use super::Failure;

pub(crate) struct Tls {
    /// `None` when it has failed: it must not be used after that.
    session: Option<UnbufferedServerConnection>,
    /// The beginning of a record.
    rest: Vec<u8>,
    /// The peer's close_notify has come.
    is_ended: bool,
}

/// A server with the chain of certificates and the key of these PEM files.
pub(crate) fn config(chain: &Path, key: &Path) -> Result<Arc<ServerConfig>, Failure> {
    let chain = CertificateDer::pem_file_iter(chain)?.collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_file(key)?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    // Clients stay for long, so there is nothing to gain by tickets and resumed sessions.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

impl Tls {
    pub(crate) fn new(config: &Arc<ServerConfig>) -> Result<Self, Error> {
        let session = UnbufferedServerConnection::new(Arc::clone(config))?;
        Ok(Self { session: Some(session), rest: Vec::new(), is_ended: false })
    }

    /// The peer says no more, or the session has failed.
    pub(crate) fn is_ended(&self) -> bool {
        self.is_ended || self.session.is_none()
    }

    /// Takes what has arrived: appends what the peer says to `plain`, and what has to be sent to `records`, which is an
    /// alert where the session fails.
    pub(crate) fn receive(&mut self, bytes: &mut [u8], plain: &mut Vec<u8>, records: &mut Vec<u8>) {
        if self.rest.is_empty() {
            let used = self.advance(bytes, plain, records, |_, _| {});
            self.rest = bytes[used..].to_vec();
        } else {
            self.rest.extend_from_slice(bytes);
            self.advance_rest(plain, records, |_, _| {});
        }
    }

    /// Encrypts; nothing where the session is not open.
    pub(crate) fn send(&mut self, plain: &[u8], records: &mut Vec<u8>) {
        self.advance_rest(&mut Vec::new(), records, |traffic, records| {
            append(records, |room| match traffic.encrypt(plain, room) {
                Err(EncryptError::InsufficientSize(size)) => Err(size.required_size),
                result => Ok(result.unwrap_or(0)), // its keys are used up
            });
        });
    }

    /// Ends what this side says, by close_notify.
    pub(crate) fn finish(&mut self, records: &mut Vec<u8>) {
        self.advance_rest(&mut Vec::new(), records, |traffic, records| {
            append(records, |room| match traffic.queue_close_notify(room) {
                Err(EncryptError::InsufficientSize(size)) => Err(size.required_size),
                result => Ok(result.unwrap_or(0)),
            });
        });
    }

    fn advance_rest(
        &mut self,
        plain: &mut Vec<u8>,
        records: &mut Vec<u8>,
        speak: impl FnMut(&mut WriteTraffic<'_, ServerConnectionData>, &mut Vec<u8>),
    ) {
        let mut rest = mem::take(&mut self.rest);
        let used = self.advance(&mut rest, plain, records, speak);
        if used < rest.len() {
            rest.drain(..used);
            self.rest = rest;
        }
    }

    /// Goes on until the session wants more bytes, and lets `speak` once it may; says how many of them it has used.
    fn advance(
        &mut self,
        bytes: &mut [u8],
        plain: &mut Vec<u8>,
        records: &mut Vec<u8>,
        mut speak: impl FnMut(&mut WriteTraffic<'_, ServerConnectionData>, &mut Vec<u8>),
    ) -> usize {
        let Some(session) = &mut self.session else { return bytes.len() };
        let mut used = 0;
        loop {
            let UnbufferedStatus { discard, state, .. } =
                session.process_tls_records(&mut bytes[used..]);
            used += discard;
            match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(Ok(record)) = traffic.next_record() {
                        used += record.discard;
                        plain.extend_from_slice(record.payload);
                    }
                }
                Ok(ConnectionState::EncodeTlsData(data)) => encode(data, records),
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                Ok(ConnectionState::PeerClosed) => self.is_ended = true,
                Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                    speak(&mut traffic, records);
                    return used;
                }
                Ok(_) => return used,
                Err(_) => {
                    let status = session.process_tls_records(&mut bytes[used..]);
                    if let Ok(ConnectionState::EncodeTlsData(alert)) = status.state {
                        encode(alert, records);
                    }
                    self.session = None;
                    return bytes.len();
                }
            }
        }
    }
}

fn encode(mut data: EncodeTlsData<'_, ServerConnectionData>, records: &mut Vec<u8>) {
    append(records, |room| match data.encode(room) {
        Err(EncodeError::InsufficientSize(size)) => Err(size.required_size),
        result => Ok(result.unwrap_or(0)),
    });
}

/// Appends what `write` puts into the room that it asks for by an error, and that many bytes of it.
fn append(out: &mut Vec<u8>, mut write: impl FnMut(&mut [u8]) -> Result<usize, usize>) {
    let begins = out.len();
    let mut written = write(&mut []);
    if let Err(needed) = written {
        out.resize(begins + needed, 0);
        written = write(&mut out[begins..]);
    }
    out.truncate(begins + written.unwrap_or(0));
}
