//! Clients without sockets against real kernels, in separate network namespaces. If a tun device or a namespace is not
//! available, the test is skipped, with a message.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use c1000k_record::{Limit, Verdict};
use nix::sched::{CloneFlags, unshare};

use crate::common::{Client, DEADLINE, Ended, Manner, Server, record, run};
use crate::servers::Foreign;

const ANY: Ipv4Addr = Ipv4Addr::UNSPECIFIED;

/// Runs the test on a thread of its own in a new network namespace, which its children share.
fn in_own_network(test: impl FnOnce() + Send + 'static) {
    let skip = |why: &str| {
        eprintln!("a test of stateless clients is skipped: {why}");
    };
    if fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").is_err() {
        return skip("/dev/net/tun can't be opened");
    }
    let ran = thread::spawn(move || {
        if unshare(CloneFlags::CLONE_NEWNET).is_err() || !ip("link set lo up") {
            return false;
        }
        test();
        true
    });
    if !ran.join().unwrap() {
        skip("a network namespace takes privilege, and `ip`");
    }
}

fn ip(words: &str) -> bool {
    let ran = Command::new("ip").args(words.split(' ')).status();
    ran.is_ok_and(|status| status.success())
}

fn stateless(server: &Server, options: &str) -> (Ended, c1000k_record::ClientRecord) {
    run(&format!("127.0.0.1 {} --stateless {options}", server.first_port))
}

#[test]
fn all_phases_are_played_without_a_socket() {
    in_own_network(|| {
        let server = Server::start_at(ANY, Manner::Echo, 3);
        let options = "--ports 3 -c 3k --heartbeat 200ms --hold 600ms --churn 100 --storm \
                       --fail-if lost>0 --fail-if echo.p99>5s";
        let (ended, record) = stateless(&server, options);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(record.stateless && record.file_table.is_none(), "{record:?}");
        assert_eq!((record.established, record.verified), (3_000, Some(3_000)), "{record:?}");
        assert_eq!((record.failed, record.lost), (0, 0));
        assert!(record.retransmitted.is_some(), "{record:?}");
        assert_eq!(record.verdict, Verdict::Reached);
        assert!(record.state_bytes >= Some(8 * 3_000), "{record:?}");
        assert!(record.hold_seconds >= 0.6, "{record:?}");
        let workload = record.workload.unwrap();
        assert_eq!(workload.sent, workload.answered, "{workload:?}");
        assert!(workload.sent + workload.skipped > 8_000, "{workload:?}");
        let churn = record.churn.unwrap();
        assert!(churn.closed >= 50 && churn.closed == churn.reopened, "{churn:?}");
        let storm = record.storm.unwrap();
        assert_eq!((storm.dropped, storm.back), (3_000, 3_000));
        assert!(storm.connect_latency_us.p50 > Some(0), "{storm:?}");
        assert!(record.ramp_series.last().is_some_and(|point| point.established == 3_000));
        assert_eq!(server.die(), 3_000);
    });
}

#[test]
fn loss_is_survived_and_leaves_nothing_behind() {
    in_own_network(|| {
        let server = Server::start_at(ANY, Manner::Echo, 3);
        let options = "--ports 3 -c 1k --hold 100ms --connect-timeout 60s --stateless-loss 5%";
        let client = Client::start(&format!(
            "127.0.0.1 {} --stateless {options} --json -",
            server.first_port
        ));
        let ended = client.end();
        let record = record(&ended);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert_eq!((record.verified, record.lost, record.failed), (Some(1_000), 0, 0));
        assert!(record.retransmitted > Some(100), "{record:?}");
        assert!(ended.stderr.iter().any(|line| line.starts_with("packets were lost")), "{ended:?}");
        // The client has checked until the server had all resets.
        let open = fs::read_to_string("/proc/thread-self/net/sockstat").unwrap();
        let in_use = open.lines().find_map(|line| line.strip_prefix("TCP: inuse ")).unwrap();
        assert!(in_use.starts_with("3 "), "its listeners and nothing else: {in_use}");
    });
}

#[test]
fn what_a_server_does_is_named() {
    in_own_network(|| {
        for (manner, limit, words) in [
            (Manner::RefusePast(100), Limit::Server, "the server was the limit"),
            (Manner::HangUpPast(100), Limit::Server, "the server was the limit"),
            (Manner::Garble, Limit::Server, "not an echo server"),
        ] {
            let server = Server::start_at(ANY, manner, 1);
            let (ended, record) = stateless(&server, "--ports 1 -c 1k --hold 0s");
            assert_eq!((ended.code, record.limit), (Some(1), Some(limit)), "{manner:?} {ended:?}");
            let line = ended.stderr.join("\n");
            assert!(line.contains(words), "{manner:?}: {line}");
        }
        let server = Server::start_at(ANY, Manner::GarbleAfterEcho, 1);
        let (ended, record) = stateless(&server, "--ports 1 -c 50 --hold 0s");
        assert_eq!((ended.code, record.established, record.lost), (Some(1), 50, 50), "{ended:?}");
        let server = Server::start_at(ANY, Manner::SilentAfterEcho, 1);
        let (ended, record) = stateless(&server, "--ports 1 -c 50 --hold 0s --connect-timeout 1s");
        assert_eq!((ended.code, record.lost), (Some(1), 50), "{ended:?}");
        assert!(record.limit_detail.unwrap().contains("(ETIMEDOUT 50)"), "{ended:?}");
        assert!(record.failures.is_empty(), "no attempt failed: {ended:?}");
        let server = Server::start_at(ANY, Manner::Dribble, 1);
        let (ended, _) = stateless(&server, "--ports 1 -c 50 --hold 0s");
        assert_eq!(ended.code, Some(0), "answers may come byte by byte: {ended:?}");
    });
}

#[test]
fn a_server_that_goes_takes_them_with_it() {
    in_own_network(|| {
        let server = Server::start_at(ANY, Manner::Echo, 1);
        let words =
            format!("127.0.0.1 {} --stateless --ports 1 -c 200 --hold 30s", server.first_port);
        let mut client = Client::start(&format!("{words} --json -"));
        client.await_line("holding");
        server.die();
        let ended = client.end();
        let record = record(&ended);
        assert_eq!((ended.code, record.lost), (Some(1), 200), "{ended:?}");
        assert!(record.hold_seconds < 20.0, "nothing was left to hold: {record:?}");
    });
}

#[test]
fn what_cannot_be_reopened_is_lost_and_the_server_is_named() {
    in_own_network(|| {
        for silent in [false, true] {
            let server = Server::start_at(ANY, Manner::Echo, 1);
            let words = format!(
                "127.0.0.1 {} --stateless --ports 1 -c 200 --hold 2s --churn 20 \
                 --in-flight 5 --connect-timeout 1s --json -",
                server.first_port
            );
            let began = Instant::now();
            let mut client = Client::start(&words);
            client.await_line("holding");
            if silent {
                server.fall_silent();
            } else {
                server.stop_listening();
            }
            let ended = client.end();
            let record = record(&ended);
            let churn = record.churn.unwrap();
            assert!(churn.closed > churn.reopened, "{churn:?}");
            assert!(record.lost >= churn.closed - churn.reopened, "{ended:?}");
            assert_eq!(record.failed, 0, "{ended:?}");
            // The second verification ends early if the server is silent.
            let verified = record.verified.unwrap();
            assert!(silent || verified + record.lost == 200, "{ended:?}");
            assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
            assert_eq!(record.limit, Some(Limit::Server), "{ended:?}");
            assert!((2.0..2.5).contains(&record.hold_seconds), "{}", record.hold_seconds);
        }
    });
}

#[test]
fn messages_that_are_due_while_churn_reopens_are_skipped() {
    in_own_network(|| {
        let server = Server::start_at(ANY, Manner::DelayFirst(Duration::from_millis(4)), 1);
        let options = "--ports 1 -c 20 --hold 2100ms --heartbeat 70ms --churn 200";
        let (ended, record) = stateless(&server, options);
        assert_eq!((ended.code, record.lost), (Some(0), 0), "{ended:?}");
        let workload = record.workload.unwrap();
        assert!(workload.skipped > 0, "{workload:?}");
        assert_eq!(workload.sent + workload.skipped, 600, "{workload:?}");
    });
}

#[test]
fn the_hold_ends_when_most_connections_are_lost() {
    in_own_network(|| {
        let server = Server::start_at(ANY, Manner::Echo, 1);
        let words =
            format!("127.0.0.1 {} --stateless --ports 1 -c 200 --hold 30s", server.first_port);
        let mut client = Client::start(&format!("{words} --json -"));
        client.await_line("holding");
        server.drop_some(150);
        let ended = client.end();
        let record = record(&ended);
        assert_eq!((ended.code, record.lost), (Some(1), 150), "{ended:?}");
        assert!(record.hold_seconds < 20.0, "too few were left: {record:?}");
    });
}

#[test]
fn nothing_that_listens_is_one_line() {
    in_own_network(|| {
        let ended = Client::start("127.0.0.1 9 --stateless --ports 1 -c 10").end();
        let line = ended.stderr.last().unwrap();
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(line.contains("nothing listens on 198.18.0.1:9"), "{line}");
    });
}

#[test]
fn a_prefix_that_this_machine_has_a_route_to_is_refused() {
    in_own_network(|| {
        assert!(ip("link add dummy0 type veth peer name dummy1"));
        assert!(ip("addr add 198.19.7.1/24 dev dummy0") && ip("link set dummy0 up"));
        let ended = Client::start("127.0.0.1 9900 --stateless -c 10").end();
        let line = ended.stderr.last().unwrap();
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(line.contains("198.19.7.0/24") && line.contains("--stateless-prefix"), "{line}");
    });
}

/// A server behind a link: another network namespace, held by a process that sleeps.
struct Remote {
    holder: Child,
}

impl Remote {
    fn new() -> Self {
        let mut command = Command::new("unshare");
        let holder = command.args(["--net", "sleep", "300"]).stdin(Stdio::null()).spawn().unwrap();
        let remote = Self { holder };
        let network = format!("/proc/{}/ns/net", remote.holder.id());
        let own = fs::read_link("/proc/thread-self/ns/net").unwrap();
        let began = std::time::Instant::now();
        while fs::read_link(&network).is_ok_and(|there| there == own) {
            assert!(began.elapsed() < DEADLINE);
            thread::sleep(Duration::from_millis(5));
        }
        let id = remote.holder.id();
        assert!(ip(&format!("link add near type veth peer name far netns {id}")));
        assert!(ip("addr add 10.9.0.1/24 dev near") && ip("link set near up"));
        remote.run("ip addr add 10.9.0.2/24 dev far");
        remote.run("ip link set far up");
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        remote
    }

    fn command(&self, words: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.holder.id())).args(words.split(' '));
        command
    }

    fn run(&self, words: &str) {
        assert!(self.command(words).status().unwrap().success(), "{words}");
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

#[test]
fn a_remote_server_is_flooded_only_once_answers_come_back() {
    in_own_network(|| {
        let remote = Remote::new();
        let echo = "import asyncio\n\
                    async def serve(reader, writer):\n\
                    \x20   try:\n\
                    \x20       while data := await reader.read(4096):\n\
                    \x20           writer.write(data)\n\
                    \x20   except ConnectionResetError:\n\
                    \x20       pass\n\
                    async def main():\n\
                    \x20   server = await asyncio.start_server(serve, '10.9.0.2', 9900, backlog=1000)\n\
                    \x20   await server.serve_forever()\n\
                    asyncio.run(main())";
        if !Path::new("/usr/bin/python3").exists() {
            return println!("python3 is not installed: the test of a remote server is skipped");
        }
        let server = remote.command("/usr/bin/python3 -c").arg(echo).spawn();
        let mut server = server.unwrap();
        let words = "10.9.0.2 9900 --ports 1 --stateless -c 300 --hold 0s --connect-timeout 3s";
        let (ended, record) = run(words);
        let lines = ended.stderr.join("\n");
        assert_eq!((ended.code, record.attempted), (Some(1), 1), "one connection only: {lines}");
        assert!(lines.contains("ip route add 198.18.0.0/15 via"), "{lines}");
        remote.run("ip route add 198.18.0.0/15 via 10.9.0.1");
        let (ended, record) = run(words);
        server.kill().unwrap();
        server.wait().unwrap();
        assert_eq!((ended.code, record.verified), (Some(0), Some(300)), "{ended:?}");
    });
}

#[test]
fn servers_of_others_answer_them() {
    in_own_network(|| {
        let redis = Foreign::start("redis-server", false, |_, [port, _]| {
            let words = format!("--bind 0.0.0.0 --protected-mode no --port {port} --save");
            let words = words.split(' ').map(str::to_owned);
            words.chain([String::new(), "--appendonly".to_owned(), "no".to_owned()]).collect()
        });
        if let Some(redis) = redis {
            assert_holds(&format!("redis://127.0.0.1:{}", redis.ports[0]));
        }
        let nginx = Foreign::start("nginx", false, |folder, [port, _]| {
            let config = format!(
                "daemon off; pid nginx.pid; error_log stderr; worker_processes 1;
                events {{ worker_connections 2048; }}
                http {{
                    access_log off; keepalive_requests 100000;
                    client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3;
                    uwsgi_temp_path t4; scgi_temp_path t5;
                    server {{ listen {port}; location / {{ root {}; }} }}
                }}",
                folder.display()
            );
            fs::write(folder.join("index.html"), vec![b'x'; 5_000]).unwrap();
            fs::write(folder.join("nginx.conf"), config).unwrap();
            let folder = folder.display();
            ["-p", &format!("{folder}"), "-c", &format!("{folder}/nginx.conf")]
                .map(str::to_owned)
                .into()
        });
        if let Some(nginx) = nginx {
            // 5,000 bytes are four segments.
            assert_holds(&format!("http://127.0.0.1:{}/index.html", nginx.ports[0]));
        }
    });
}

fn assert_holds(target: &str) {
    let words = format!("{target} --stateless -c 200 --heartbeat 300ms --hold 600ms");
    let (ended, record) = run(&words);
    assert_eq!(ended.code, Some(0), "{words}: {ended:?}");
    assert_eq!(record.verified_passes, [200, 200], "{words}");
    let workload = record.workload.unwrap();
    assert_eq!((workload.sent, workload.answered), (400, 400), "{words}");
}

/// The server of the benchmarks: a bare loop over epoll.
#[test]
fn a_plain_epoll_server_answers_them() {
    in_own_network(|| {
        let folder = tempfile::tempdir().unwrap();
        let floor = folder.path().join("floor");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/c/floor.c");
        let on_all = folder.path().join("floor.c");
        let text = fs::read_to_string(source).unwrap().replace("INADDR_LOOPBACK", "INADDR_ANY");
        fs::write(&on_all, text).unwrap();
        let built = Command::new("cc").args(["-O2", "-o"]).arg(&floor).arg(on_all).status();
        if !built.is_ok_and(|status| status.success()) {
            return println!("there is no C compiler: the test of a plain server is skipped");
        }
        let mut server = Command::new(&floor).args(["9900", "2"]).spawn().unwrap();
        let began = std::time::Instant::now();
        while std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, 9901)).is_err() {
            assert!(began.elapsed() < DEADLINE);
            thread::sleep(Duration::from_millis(10));
        }
        let (ended, record) = run("127.0.0.1 9900 --ports 2 --stateless -c 500 --hold 100ms");
        server.kill().unwrap();
        server.wait().unwrap();
        assert_eq!((ended.code, record.verified), (Some(0), Some(500)), "{ended:?}");
    });
}

#[test]
fn what_can_not_be_is_refused_before_anything_is_opened() {
    for (words, part) in [
        ("127.0.0.1 --stateless --source 127.0.0.2", "--source"),
        ("wss://127.0.0.1 --stateless", "tcp, http and redis"),
        ("::1 --stateless", "IPv4"),
        ("127.0.0.1 --stateless --stateless-prefix 198.18.0.0/31", "/8 to /30"),
        ("127.0.0.1 --stateless --stateless-prefix 127.1.0.0/16", "no host can have"),
        ("127.0.0.1 --stateless --stateless-prefix nonsense", "invalid"),
        ("198.18.7.7 --stateless", "one of the clients'"),
        ("127.0.0.1 --stateless --message-size 2k", "one segment"),
        ("127.0.0.1 --ports 1 --stateless --stateless-prefix 10.0.0.0/30 -c 1M", "room for 64,512"),
        ("127.0.0.1 --stateless-prefix 10.0.0.0/30", "--stateless"),
    ] {
        let ended = Client::start(words).end();
        let text = ended.stderr.join(" ");
        assert_eq!(ended.code, Some(2), "{words}: {text}");
        assert!(text.contains(part), "{words}: {text}");
    }
}
