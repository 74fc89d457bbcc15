//! Third-party servers: each protocol against a common one. A server that is not installed is skipped, with a message.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use c1000k_record::ClientRecord;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::common::{Client, DEADLINE, Ended, run};

/// The time after which a server that does not end is killed.
const ENDS_WITHIN: Duration = Duration::from_secs(5);

/// A server as a child, ended with this.
pub(crate) struct Foreign {
    child: Child,
    folder: TempDir,
    pub(crate) ports: [u16; 2],
}

impl Foreign {
    /// Starts it once `configure` has written its files; both of its ports listen then, or the first one alone.
    pub(crate) fn start(
        program: &str,
        both_listen: bool,
        configure: impl FnOnce(&Path, [u16; 2]) -> Vec<String>,
    ) -> Option<Self> {
        let is_here =
            Command::new("sh").args(["-c", "command -v \"$0\"", program]).output().unwrap();
        if !is_here.status.success() {
            println!("{program} is not installed: its test is skipped");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let ports = [free_port(), free_port()];
        let arguments = configure(folder.path(), ports);
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let child = Command::new(program)
            .args(arguments)
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut server = Self { child, folder, ports };
        server.await_port(ports[0]);
        if both_listen {
            server.await_port(ports[1]);
        }
        Some(server)
    }

    fn await_port(&mut self, port: u16) {
        let began = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            let log = fs::read_to_string(self.folder.path().join("log")).unwrap();
            assert!(self.child.try_wait().unwrap().is_none(), "it has ended: {log}");
            assert!(began.elapsed() < DEADLINE, "it does not listen: {log}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A Unix-domain socket in its folder.
    fn socket(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn ca(&self) -> String {
        format!("--ca {}", self.folder.path().join("cert.pem").display())
    }
}

impl Foreign {
    /// Asks it to end, because a server that is killed leaves its worker processes behind.
    fn end(&mut self) {
        let process = Pid::from_raw(self.child.id() as i32);
        let began = Instant::now();
        let _ = kill(process, Signal::SIGTERM);
        while matches!(self.child.try_wait(), Ok(None)) && began.elapsed() < ENDS_WITHIN {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        self.end();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// A certificate for localhost, which is its own authority.
fn make_certificate(folder: &Path) {
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"])
        .args(["-days", "2", "-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "cert.pem"])
        .args(["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// Everything is opened, verified twice, and a heartbeat of each is answered.
fn assert_holds(target: &str, options: &str, count: u64) {
    let words = format!("{target} -c {count} --heartbeat 300ms --hold 600ms {options}");
    let (ended, record) = run(&words);
    assert_eq!(ended.code, Some(0), "{words}: {ended:?}");
    assert_eq!(record.verified_passes, [count, count], "{words}");
    let workload = record.workload.unwrap();
    assert_eq!((workload.sent, workload.answered), (2 * count, 2 * count), "{words}");
    assert!(target.starts_with(&record.protocol), "{words}: {}", record.protocol);
}

/// Nothing is held, and the line says so with these words.
fn assert_refused(target: &str, options: &str, words: &str) {
    let (ended, record): (Ended, ClientRecord) = run(&format!("{target} -c 3 {options}"));
    let line = ended.stderr.last().unwrap();
    assert_eq!((ended.code, record.established), (Some(1), 0), "{ended:?}");
    assert!(line.contains(words), "{line}");
}

#[test]
fn redis_answers_pings() {
    let server = Foreign::start("redis-server", false, |folder, [port, _]| {
        let words = format!(
            "--bind 127.0.0.1 --port {port} --save --appendonly no --unixsocket {}/redis.sock",
            folder.display()
        );
        let mut words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        words.insert(5, String::new());
        words
    });
    let Some(server) = server else { return };
    assert_holds(&format!("redis://127.0.0.1:{}", server.ports[0]), "", 200);
    assert_refused(&format!("http://127.0.0.1:{}", server.ports[0]), "", "HTTP response");
    let socket = server.socket("redis.sock");
    assert_holds(&format!("redis+unix:{socket}"), "", 200);
    assert_holds(&format!("redis+unix:{socket}"), "--churn 50/s --storm", 100);
    assert_refused(&format!("http+unix:{socket}"), "", "HTTP response");
}

#[test]
fn nginx_answers_requests_with_and_without_tls() {
    let server = Foreign::start("nginx", true, |folder, [http, https]| {
        make_certificate(folder);
        let config = format!(
            "daemon off; pid nginx.pid; error_log stderr; worker_processes 1;
            events {{ worker_connections 2048; }}
            http {{
                access_log off; keepalive_requests 100000;
                client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3;
                uwsgi_temp_path t4; scgi_temp_path t5;
                server {{
                    listen 127.0.0.1:{http}; listen 127.0.0.1:{https} ssl;
                    listen unix:{0}/http.sock; listen unix:{0}/https.sock ssl;
                    ssl_certificate {0}/cert.pem; ssl_certificate_key {0}/key.pem;
                    location / {{ return 200 'all is well'; }}
                    location /missing {{ return 404; }}
                }}
            }}",
            folder.display()
        );
        fs::write(folder.join("nginx.conf"), config).unwrap();
        let folder = folder.display();
        ["-p", &format!("{folder}"), "-c", &format!("{folder}/nginx.conf")]
            .map(str::to_owned)
            .into()
    });
    let Some(server) = server else { return };
    let [http, https] = server.ports;
    assert_holds(&format!("http://localhost:{http}/health?x=1"), "", 200);
    assert_holds(&format!("https://localhost:{https}/"), &server.ca(), 100);
    assert_holds(&format!("https://127.0.0.1:{https}/"), "--insecure", 100);
    assert_refused(&format!("http://localhost:{http}/missing"), "", "404");
    assert_refused(&format!("https://localhost:{https}/"), "", "TLS: invalid peer certificate");
    let ended = Client::start(&format!("https://127.0.0.1:{https}/ -c 3 --ca /nowhere.pem")).end();
    assert!(ended.code == Some(2) && ended.stderr[0].contains("/nowhere.pem"), "{ended:?}");
    assert_refused(&format!("ws://localhost:{http}/"), "", "a WebSocket upgrade");
    let [plain, tls] = ["http.sock", "https.sock"].map(|name| server.socket(name));
    assert_holds(&format!("http+unix:{plain}:/health?x=1"), "", 200);
    assert_holds(&format!("https+unix:{tls}"), &server.ca(), 100);
    assert_refused(&format!("http+unix:{plain}:/missing"), "", "404");
    assert_refused(&format!("https+unix:{tls}"), "", "TLS: invalid peer certificate");
    assert_holds(&format!("http://localhost:{http} http+unix:{plain}:/health"), "", 200);
}

#[test]
fn mosquitto_answers_pings_and_acknowledges_messages() {
    let server = Foreign::start("mosquitto", true, |folder, [mqtt, mqtts]| {
        make_certificate(folder);
        let config = format!(
            "user root\nallow_anonymous true\nlistener {mqtt} 127.0.0.1\nlistener {mqtts} 127.0.0.1\n\
             certfile {0}/cert.pem\nkeyfile {0}/key.pem\nlistener 0 {0}/mqtt.sock\n",
            folder.display()
        );
        fs::write(folder.join("mosquitto.conf"), config).unwrap();
        vec!["-c".to_owned(), format!("{}/mosquitto.conf", folder.display())]
    });
    let Some(server) = server else { return };
    let [mqtt, mqtts] = server.ports;
    assert_holds(&format!("mqtt://127.0.0.1:{mqtt}"), "", 200);
    assert_holds(&format!("mqtt://127.0.0.1:{mqtt}"), "--message-size 300", 200);
    assert_holds(&format!("mqtts://localhost:{mqtts}"), &server.ca(), 100);
    assert_holds(&format!("mqtt+unix:{}", server.socket("mqtt.sock")), "", 100);
}

const WEBSOCKET_SERVER: &str = "
import asyncio, ssl, sys, websockets
async def echo(connection, path=None):
    async for message in connection:
        await connection.send(message)
async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain('cert.pem', 'key.pem')
    async with websockets.serve(echo, '127.0.0.1', int(sys.argv[1])), \\
            websockets.serve(echo, '127.0.0.1', int(sys.argv[2]), ssl=context):
        await asyncio.Future()
asyncio.run(main())
";

#[test]
fn a_websocket_server_answers_pings_and_messages() {
    const PYTHON: &str = "/usr/bin/python3";
    let has_module = Command::new(PYTHON).args(["-c", "import websockets"]).output();
    if !has_module.is_ok_and(|output| output.status.success()) {
        println!("python3-websockets is not installed: its test is skipped");
        return;
    }
    let server = Foreign::start(PYTHON, true, |folder, [ws, wss]| {
        make_certificate(folder);
        vec!["-c".to_owned(), WEBSOCKET_SERVER.to_owned(), ws.to_string(), wss.to_string()]
    });
    let Some(server) = server else { return };
    let [ws, wss] = server.ports;
    assert_holds(&format!("ws://localhost:{ws}/room"), "", 100);
    assert_holds(&format!("ws://localhost:{ws}"), "--message-size 70000", 20);
    assert_holds(
        &format!("wss://localhost:{wss}"),
        &format!("--message hello {}", server.ca()),
        50,
    );
}

#[test]
fn openssl_reverses_lines_through_tls() {
    for version in ["-tls1_2", "-tls1_3"] {
        let server = Foreign::start("openssl", false, |folder, [port, _]| {
            make_certificate(folder);
            let words = format!(
                "s_server -rev -quiet {version} -accept {port} -cert cert.pem -key key.pem"
            );
            words.split(' ').map(str::to_owned).collect()
        });
        let Some(server) = server else { return };
        let talk = format!(r"--ports 1 --message abc\n --expect cba\n {}", server.ca());
        assert_holds(&format!("tls://localhost:{}", server.ports[0]), &talk, 1);
    }
}
