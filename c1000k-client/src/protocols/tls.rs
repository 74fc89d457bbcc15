//! TLS 1.2 and 1.3 below another protocol.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use c1000k_record::{ConnectionBytes, input};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, UnbufferedClientConnection, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, UnbufferedStatus, WriteTraffic,
};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, HandshakeType, RootCertStore,
    SignatureScheme,
};

use super::{Answer, Complaint, ECHO, Protocol};

/// Which certificates are accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// A certificate of an authority that this machine trusts.
    System,
    /// One of an authority in this PEM file.
    File(PathBuf),
    /// Any certificate.
    Anyone,
}

/// The largest file of `--ca`; those of distributions have some 200 KB.
const AUTHORITIES_BYTES_MAX: u64 = 16 << 20;

impl Trust {
    /// Reads the file, if there is one.
    ///
    /// # Errors
    /// One line with the reason why it can't be used.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self {
            Self::File(_) => roots(self).map(drop),
            Self::System | Self::Anyone => Ok(()),
        }
    }
}

/// Another protocol through TLS. Each connection makes a full handshake: sessions are not resumed.
#[derive(Clone, Debug)]
pub struct Tls<P> {
    inner: P,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    complaint: Complaint,
}

/// The session of a connection, a few kilobytes, and the state of the protocol above.
pub struct TlsState<S> {
    /// `None` until it is opened.
    session: Option<Box<UnbufferedClientConnection>>,
    /// An incomplete record.
    input: Vec<u8>,
    /// The protocol above has started.
    is_open: bool,
    inner: S,
}

impl<S: fmt::Debug> fmt::Debug for TlsState<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = f.debug_struct("TlsState");
        text.field("is_open", &self.is_open).field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl<P> Tls<P> {
    /// For a server with this name, which must be in its certificate.
    ///
    /// # Errors
    /// One line: the name can't be in a certificate, or no authority is available.
    pub fn new(inner: P, name: &str, trust: &Trust) -> Result<Self, String> {
        let name = ServerName::try_from(name.to_owned())
            .map_err(|_| format!("{name:?} is not a name that a certificate can contain"))?;
        Ok(Self { inner, config: Arc::new(config(trust)?), name, complaint: Complaint::default() })
    }
}

fn config(trust: &Trust) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let algorithms = Arc::clone(&provider);
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS can't be set up: {error}"))?;
    let mut config = match trust {
        Trust::Anyone => {
            let verifier = Arc::new(AnyCertificate(algorithms));
            builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth()
        }
        trust => {
            let roots = Arc::new(roots(trust)?);
            let verifier =
                WebPkiServerVerifier::builder_with_provider(roots, algorithms).build().map_err(
                    |error| format!("no certificate authority is known: {error}; {HELP}"),
                )?;
            builder.with_webpki_verifier(verifier).with_no_client_auth()
        }
    };
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// The handshake may fail, so the answer is more than an echo, and `--no-verify` is no remedy.
const ECHO_THROUGH_TLS: &str = "an echo of what was sent, through TLS";

/// An error of the handshake, and the remedy.
fn explanation(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(CertificateError::Other(other))
            if format!("{other:?}").contains("CaUsedAsEndEntity") =>
        {
            "invalid peer certificate: the server presents the certificate of an authority (CA:TRUE); use one with \
             basicConstraints=CA:FALSE for the server, or --insecure to accept any certificate"
                .to_owned()
        }
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            format!("{error}: no trusted authority has signed it; {HELP}")
        }
        // Their own texts are lists of numbers.
        Error::InvalidCertificate(
            CertificateError::UnsupportedSignatureAlgorithmContext { .. }
            | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. },
        ) => format!(
            "invalid peer certificate: the kind of its signature is not supported, or does not fit the key of the \
             trusted authority with its issuer's name; {HELP}"
        ),
        Error::InvalidCertificate(_) => format!("{error}; {HELP}"),
        Error::InvalidMessage(_) => format!("the server does not speak TLS on this port: {error}"),
        Error::InappropriateHandshakeMessage { got_type: HandshakeType::ClientHello, .. } => {
            "the server does not speak TLS on this port: it returned what the client sent".to_owned()
        }
        Error::AlertReceived(_) => format!("the server refused the handshake: {error}"),
        _ => error.to_string(),
    }
}

const HELP: &str =
    "use --ca FILE for the server's authority, or --insecure to accept any certificate";

fn roots(trust: &Trust) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    let certificates = match trust {
        Trust::File(path) => {
            let refusal = |reason: &dyn fmt::Display| {
                format!("--ca {}: {reason}; use a PEM file", path.display())
            };
            let bytes =
                input::read(path, AUTHORITIES_BYTES_MAX).map_err(|error| refusal(&error))?;
            CertificateDer::pem_slice_iter(&bytes)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| refusal(&error))?
        }
        _ => rustls_native_certs::load_native_certs().certs,
    };
    let (added, _) = roots.add_parsable_certificates(certificates);
    match (added, trust) {
        (0, Trust::File(path)) => Err(format!("--ca {} has no certificate in it", path.display())),
        (0, _) => Err(format!("this machine has no certificate authorities; {HELP}")),
        _ => Ok(roots),
    }
}

impl<P: Protocol> Tls<P> {
    /// Processes the received records, and sends `plain`; returns the answer of the protocol above.
    fn advance(
        &self,
        state: &mut TlsState<P::State>,
        number: u32,
        plain: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> Result<Answer, Error> {
        let TlsState { session, input, is_open, inner } = state;
        let Some(session) = session else { return Ok(Answer::Mismatch) };
        let mut answer = Answer::Partial;
        loop {
            let UnbufferedStatus { mut discard, state, .. } = session.process_tls_records(input);
            let mut is_blocked = false;
            match state? {
                ConnectionState::ReadTraffic(mut traffic) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record?;
                        discard += record.discard;
                        match self.inner.receive(inner, number, record.payload, plain) {
                            Answer::Partial => {}
                            Answer::Complete if answer == Answer::Partial => {
                                answer = Answer::Complete;
                            }
                            _ => return Ok(Answer::Mismatch),
                        }
                    }
                }
                ConnectionState::EncodeTlsData(mut data) => {
                    append(out, |room| match data.encode(room) {
                        Ok(length) => Ok(length),
                        Err(EncodeError::InsufficientSize(size)) => Err(Some(size.required_size)),
                        Err(EncodeError::AlreadyEncoded) => Err(None),
                    });
                }
                ConnectionState::TransmitTlsData(data) => data.done(),
                ConnectionState::WriteTraffic(mut traffic) => {
                    if !std::mem::replace(is_open, true) {
                        self.inner.open(inner, number, plain);
                    }
                    encrypt(&mut traffic, plain, out);
                    is_blocked = true;
                }
                _ => is_blocked = true,
            }
            input.drain(..discard);
            if is_blocked {
                break;
            }
        }
        if input.is_empty() {
            // An idle connection has no buffer.
            *input = Vec::new();
        }
        Ok(answer)
    }
}

/// Sends the plain text, as one record or more.
fn encrypt<D>(traffic: &mut WriteTraffic<'_, D>, plain: &mut Vec<u8>, out: &mut Vec<u8>) {
    if !plain.is_empty() {
        append(out, |room| match traffic.encrypt(plain, room) {
            Ok(length) => Ok(length),
            Err(EncryptError::InsufficientSize(size)) => Err(Some(size.required_size)),
            Err(EncryptError::EncryptExhausted) => Err(None),
        });
        plain.clear();
    }
}

/// Appends the output of `write`, with the space that it requires; nothing if it fails.
fn append(out: &mut Vec<u8>, mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<usize>>) {
    let begins = out.len();
    loop {
        match write(&mut out[begins..]) {
            Ok(length) => return out.truncate(begins + length),
            Err(Some(needed)) if begins + needed > out.len() => out.resize(begins + needed, 0),
            Err(_) => return out.truncate(begins),
        }
    }
}

impl<P: Protocol> Protocol for Tls<P> {
    type State = TlsState<P::State>;

    fn connection_bytes() -> ConnectionBytes {
        let own = size_of::<Self::State>() - size_of::<P::State>();
        let session = size_of::<UnbufferedClientConnection>();
        ConnectionBytes { tls: (own + session) as u64, ..P::connection_bytes() }
    }

    fn state(&self) -> Self::State {
        let inner = self.inner.state();
        TlsState { session: None, input: Vec::new(), is_open: false, inner }
    }

    fn expected(&self) -> &'static str {
        match self.inner.expected() {
            ECHO => ECHO_THROUGH_TLS,
            expected => expected,
        }
    }

    fn complaint(&self) -> Option<String> {
        self.complaint.text().or_else(|| self.inner.complaint())
    }

    fn open(&self, state: &mut Self::State, number: u32, out: &mut Vec<u8>) {
        let session = UnbufferedClientConnection::new(Arc::clone(&self.config), self.name.clone());
        state.session = session.ok().map(Box::new);
        // An error shows in the first answer, or there is none.
        let _ = self.receive(state, number, &[], out);
    }

    fn heartbeat(&self, state: &mut Self::State, number: u32, out: &mut Vec<u8>) {
        let mut plain = Vec::new();
        self.inner.heartbeat(&mut state.inner, number, &mut plain);
        if self.advance(state, number, &mut plain, out).is_err() {
            state.session = None;
        }
    }

    fn receive(
        &self,
        state: &mut Self::State,
        number: u32,
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> Answer {
        state.input.extend_from_slice(bytes);
        self.advance(state, number, &mut Vec::new(), out).unwrap_or_else(|error| {
            self.complaint.note(|| format!("TLS: {}", explanation(&error)));
            // A session must not be used after an error.
            state.session = None;
            Answer::Mismatch
        })
    }

    fn has_part(&self, state: &Self::State) -> bool {
        !state.input.is_empty() || self.inner.has_part(&state.inner)
    }
}

/// Accepts any certificate; the signatures of the handshake are verified.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Echo;
    use super::*;

    fn complaint_after(bytes: &[u8]) -> String {
        let tls = Tls::new(Echo, "localhost", &Trust::Anyone).unwrap();
        let (mut state, mut out) = (tls.state(), vec![]);
        tls.open(&mut state, 1, &mut out);
        assert_eq!(tls.receive(&mut state, 1, bytes, &mut out), Answer::Mismatch);
        assert_eq!(tls.expected(), ECHO_THROUGH_TLS);
        tls.complaint().unwrap()
    }

    #[test]
    fn a_failed_handshake_is_explained() {
        let plain = complaint_after(b"HTTP/1.1 400 Bad Request\r\n");
        assert!(plain.starts_with("TLS: the server does not speak TLS on this port"), "{plain}");
        let tls = Tls::new(Echo, "localhost", &Trust::Anyone).unwrap();
        let (mut state, mut sent) = (tls.state(), vec![]);
        tls.open(&mut state, 1, &mut sent);
        let echoed = complaint_after(&sent);
        assert!(echoed.ends_with("it returned what the client sent"), "{echoed}");
        // handshake_failure, fatal.
        let alert = complaint_after(b"\x15\x03\x03\x00\x02\x02\x28");
        let part = "TLS: the server refused the handshake: received fatal alert: HandshakeFailure";
        assert!(alert.starts_with(part), "{alert}");
        let untrusted = explanation(&Error::InvalidCertificate(CertificateError::UnknownIssuer));
        assert!(untrusted.contains("--ca FILE") && untrusted.contains("--insecure"), "{untrusted}");
    }
}
