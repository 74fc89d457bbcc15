//! The push service, under clients that are not ours (Python's `websockets` and its TLS, which is OpenSSL's) and under
//! c1000k-client.

use std::io::Write;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use tempfile::TempDir;

use crate::common::descriptors::Descriptors;
use crate::{ANY_PORT, DEADLINE, Example, foreign, kin, peer, read_all, skip};

/// A service with a certificate of its own.
struct Service {
    example: Example,
    port: String,
    folder: TempDir,
}

impl Service {
    fn start(heartbeat_seconds: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let [chain, key] =
            ["cert.pem", "key.pem"].map(|name| folder.path().join(name).display().to_string());
        let words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
                     -subj /CN=localhost -addext subjectAltName=DNS:localhost";
        let mut args: Vec<_> = words.split_whitespace().collect();
        args.extend(["-keyout", &key, "-out", &chain]);
        let made = foreign("openssl", "openssl", &args)?;
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let example = Example::start("wss_push", &[ANY_PORT, &chain, &key, heartbeat_seconds]);
        let port = example.address().port().to_string();
        Some(Self { example, port, folder })
    }

    /// Runs a part of the script below as a client.
    fn python(&self, part: &str) -> Option<Python> {
        Python::start(self.folder.path(), &[part, &self.port])
    }
}

/// A client in Python, which goes on when it gets a line.
struct Python {
    child: Child,
    input: ChildStdin,
}

const INTERPRETER: &str = "/usr/bin/python3"; // where Debian's packages are found

const CLIENTS: &str = r"
import asyncio, socket, ssl, sys, time, websockets
part, port = sys.argv[1], int(sys.argv[2])
trust = ssl.create_default_context(cafile='cert.pem')
url = f'wss://localhost:{port}/'

def connect():
    return websockets.connect(url, ssl=trust, ping_interval=None)

async def texts():
    async with connect() as one, connect() as two, connect() as three:
        long = 'x' * 60000
        for said, heard in ('hello', 'hello'), (['in ', 'parts'], 'in parts'), (long, long):
            await two.send(said)
            for each in one, two, three:
                assert await each.recv() == heard
        await (await one.ping(b'are you there?'))
        await three.send(b'binary')
        await three.wait_closed()
        assert three.close_code == 1003, three.close_code
    assert (one.close_code, two.close_code) == (1000, 1000)

async def heartbeats():
    async with connect() as lively:
        for beat in range(8):
            await asyncio.sleep(0.5)
            await lively.send('alive')
            assert await lively.recv() == 'alive'
            if beat % 4 == 3:
                await asyncio.sleep(2)  # pings come, which the library answers

def tls():
    return trust.wrap_socket(socket.create_connection(('localhost', port), 30), server_hostname='localhost')

KEY = b'Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n'
UPGRADE = b'GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n' + KEY

def silence():
    began, silent, nameless = time.monotonic(), tls(), tls()
    silent.sendall(UPGRADE)
    assert b's3pPLMBiTxaQ9kYGzzhZRbK+xOo=' in silent.recv(4096)
    assert silent.recv(4096) == b'\x89\x00', 'a ping is asked'
    for each in silent, nameless:
        try:
            assert each.recv(4096) == b''
        except ConnectionResetError:
            pass
    assert 1.9 < time.monotonic() - began < 20

def close_notify():
    for early in b'', UPGRADE:
        stream = tls()
        if early:
            stream.sendall(early)
            stream.recv(4096)
        # It fails where the answer to its own close_notify is missing.
        raw = stream.unwrap()
        assert raw.recv(1) == b''
    stream = tls()
    stream.sendall(b'GET / HTTP/1.1\r\nHost: a\r\n\r\n')
    answer = stream.recv(4096)
    assert answer.startswith(b'HTTP/1.1 400 '), answer
    assert stream.recv(4096) == b'' and stream.unwrap().recv(1) == b''

async def shutdown():
    async with connect() as one:
        print('connected', flush=True)
        sys.stdin.readline()
        await one.wait_closed()
        assert one.close_code == 1001, one.close_code

work = globals()[part]
asyncio.run(work()) if asyncio.iscoroutinefunction(work) else work()
";

impl Python {
    fn start(folder: &Path, args: &[&str]) -> Option<Self> {
        let found = Command::new(INTERPRETER).args(["-c", "import websockets"]).output();
        if !found.is_ok_and(|found| found.status.success()) {
            skip(
                "python3-websockets is not installed (on Debian: apt-get install python3-websockets)",
            );
            return None;
        }
        let mut child = Command::new(INTERPRETER)
            .args(["-c", CLIENTS])
            .args(args)
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        Some(Self { child, input })
    }

    /// Sees that it ends with nothing to complain about.
    fn end(self) {
        let Self { child, input } = self;
        drop(input);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn wss_push_sends_a_text_to_all_and_answers_pings_and_closes() {
    let _descriptors = Descriptors::counted();
    let Some(service) = Service::start("30") else { return };
    let Some(clients) = service.python("texts") else { return };
    clients.end();
    service.example.terminate();
}

#[test]
fn wss_push_drops_the_silent_and_keeps_who_answers_pings() {
    let _descriptors = Descriptors::counted();
    let parts = ["heartbeats", "silence"].map(|part| {
        let service = Service::start("1")?;
        Some((service.python(part)?, service))
    });
    for (client, service) in parts.into_iter().flatten() {
        client.end();
        service.example.terminate();
    }
}

#[test]
fn wss_push_answers_close_notify_and_an_alert_to_nonsense() {
    let _descriptors = Descriptors::counted();
    let Some(service) = Service::start("30") else { return };
    let mut stranger = peer(format!("127.0.0.1:{}", service.port).parse().unwrap());
    stranger.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let answer = read_all(&mut stranger);
    assert_eq!(answer.first(), Some(&21), "no alert: {answer:?}");
    let Some(client) = service.python("close_notify") else { return };
    client.end();
    service.example.terminate();
}

#[test]
fn wss_push_says_goodbye_when_it_ends() {
    let _descriptors = Descriptors::counted();
    let Some(service) = Service::start("30") else { return };
    let Some(mut client) = service.python("shutdown") else { return };
    let mut connected = [0; 10];
    std::io::Read::read_exact(client.child.stdout.as_mut().unwrap(), &mut connected).unwrap();
    client.input.write_all(b"\n").unwrap();
    service.example.terminate();
    client.end();
}

#[test]
fn wss_push_holds_and_answers_what_c1000k_client_opens() {
    let _descriptors = Descriptors::counted();
    let Some(service) = Service::start("30") else { return };
    let Some(client) = kin("c1000k-client") else { return };
    let url = format!("wss://127.0.0.1:{}/", service.port);
    let words = "-c 300 --insecure --heartbeat 1s --hold 2s --fail-if lost>0 --fail-if failed>0";
    let output = Command::new(client)
        .arg(url)
        .args(words.split(' '))
        .args(["--connect-timeout", &format!("{}s", DEADLINE.as_secs())])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    service.example.terminate();
}
