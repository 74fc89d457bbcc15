//! The proxy, under curl and under peers of the test's.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

use crate::common::descriptors::Descriptors;
use crate::{
    ANY_PORT, Example, TOO_MUCH_BYTES, accept, expect, expect_gone, foreign, pattern, peer,
    push_through, read_all,
};

const ESTABLISHED: &[u8] = b"HTTP/1.1 200 Connection established\r\n\r\n";

/// Requests through a tunnel each; what curl prints for each of them.
fn curl(proxy: SocketAddr, url: &str, more: &[&str]) -> Option<Vec<String>> {
    let proxy = format!("http://{proxy}");
    let mut args = vec!["-q", "-sS", "--proxytunnel", "--proxy", &proxy, "--max-time", "30"];
    args.extend(["--write-out", "%{http_connect} %{http_code}\n", "--output", "/dev/null"]);
    args.extend(more);
    args.push(url);
    let output = foreign("curl", "curl", &args)?;
    let printed = String::from_utf8(output.stdout).unwrap();
    Some(printed.lines().map(str::to_owned).collect())
}

#[test]
fn connect_proxy_tunnels_for_curl_and_says_what_can_not_be_reached() {
    let _descriptors = Descriptors::counted();
    let (_web, web) = Example::listening("http_keepalive");
    let (example, proxy) = Example::listening("connect_proxy");
    let nobody = TcpListener::bind(ANY_PORT).unwrap().local_addr().unwrap();
    for (url, expected) in [
        (format!("http://localhost:{}/", web.port()), "200 200"),
        (format!("http://{web}/nothing"), "200 404"),
        (format!("http://{nobody}/"), "502 000"),
        ("http://nowhere.invalid/".to_owned(), "502 000"),
    ] {
        let Some(printed) = curl(proxy, &url, &[]) else { return };
        assert_eq!(printed, [expected], "{url}");
    }
    example.terminate();
}

#[test]
fn connect_proxy_with_few_descriptors_lets_200_connections_wait_and_fails_none() {
    let _descriptors = Descriptors::counted();
    let (_web, web) = Example::listening("http_keepalive");
    // 24 connections at most, the listener, six descriptors of the reactor's and the resolvers' own.
    let example = Example::start_within(40, "connect_proxy", &[ANY_PORT, "8"]);
    let url = format!("http://localhost:{}/#[1-200]", web.port());
    let at_once = ["--parallel", "--parallel-immediate", "--parallel-max", "200"];
    let more = [&at_once[..], &["--header", "Connection: close"]].concat();
    let Some(printed) = curl(example.address(), &url, &more) else { return };
    let failed: Vec<_> = printed.iter().filter(|line| *line != "200 200").collect();
    assert_eq!((printed.len(), &failed[..]), (200, &[][..]));
    example.terminate();
}

/// A client whose tunnel is up, and its other end.
fn tunnel(proxy: SocketAddr, upstream: &TcpListener) -> (TcpStream, TcpStream) {
    let mut client = peer(proxy);
    let request = format!("CONNECT {} HTTP/1.1\r\n\r\n", upstream.local_addr().unwrap());
    client.write_all(request.as_bytes()).unwrap();
    expect(&mut client, ESTABLISHED);
    (client, accept(upstream))
}

#[test]
fn connect_proxy_passes_bytes_half_closes_and_resets_on_both_ways() {
    let _descriptors = Descriptors::counted();
    let (example, proxy) = Example::listening("connect_proxy");
    let upstream = TcpListener::bind(ANY_PORT).unwrap();
    let (mut client, mut server) = tunnel(proxy, &upstream);
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&mut server), b"question");
    server.write_all(b"answer").unwrap();
    drop(server);
    assert_eq!(read_all(&mut client), b"answer");

    let (mut client, server) = tunnel(proxy, &upstream);
    client.write_all(b"unread").unwrap();
    server.peek(&mut [0; 6]).unwrap();
    drop(server); // with unread input it is a reset
    expect_gone(&mut client);
    example.terminate();
}

#[test]
fn connect_proxy_slows_either_side_down_to_the_other() {
    let _descriptors = Descriptors::counted();
    let (_example, proxy) = Example::listening("connect_proxy");
    let upstream = TcpListener::bind(ANY_PORT).unwrap();
    let (mut client, mut server) = tunnel(proxy, &upstream);
    let bytes = pattern(TOO_MUCH_BYTES);
    push_through(&mut client, &mut server, &bytes);
    push_through(&mut server, &mut client, &bytes);
}

#[test]
fn connect_proxy_takes_requests_in_pieces_and_what_follows_at_once() {
    let _descriptors = Descriptors::counted();
    let (_example, proxy) = Example::listening("connect_proxy");
    let upstream = TcpListener::bind(ANY_PORT).unwrap();
    let head = format!("CONNECT {} HTTP/1.1\r\nHost: a\r\n\r\n", upstream.local_addr().unwrap());
    let mut client = peer(proxy);
    for byte in head.bytes() {
        client.write_all(&[byte]).unwrap();
    }
    expect(&mut client, ESTABLISHED);
    drop(accept(&upstream));

    let mut client = peer(proxy);
    let early = pattern(20_000);
    client.write_all(&[head.as_bytes(), &early].concat()).unwrap();
    let mut received = vec![0; early.len()];
    accept(&upstream).read_exact(&mut received).unwrap();
    assert!(received == early, "what came with the request differs");

    for (request, status) in [
        ("GET http://a/ HTTP/1.1\r\n\r\n".to_owned(), "405"),
        ("nonsense\r\n\r\n".to_owned(), "400"),
        ("CONNECT localhost HTTP/1.1\r\n\r\n".to_owned(), "502"),
        (format!("CONNECT a:1 HTTP/1.1\r\nX: {}", "x".repeat(8 * 1024)), "431"),
    ] {
        let mut client = peer(proxy);
        client.write_all(request.as_bytes()).unwrap();
        let answer = String::from_utf8(read_all(&mut client)).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {answer}");
    }
}
