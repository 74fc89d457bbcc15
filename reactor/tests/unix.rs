//! Unix-domain stream listeners and connects.

#![expect(clippy::unwrap_used, reason = "a test reports errors by panicking")]

use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream};
use std::path::Path;

use common::descriptors::Descriptors;
use common::{Conn, DEADLINE, Event, LOOPBACK, Why, World, echo};
use nix::libc;
use reactor::{Address, ConnectOptions, Error, ListenOptions, ListenerId};

mod common;

fn listen(world: &mut World, address: impl Into<Address>) -> Result<ListenerId, Error> {
    world.cx().listen(address, &ListenOptions::default())
}

fn peer(path: &Path) -> UnixStream {
    let peer = UnixStream::connect(path).unwrap();
    peer.set_read_timeout(Some(DEADLINE)).unwrap();
    peer
}

fn unique_name(of: &str) -> String {
    format!("reactor-test-{of}-{}", std::process::id())
}

#[test]
fn a_path_is_served_like_a_port() {
    let _descriptors = Descriptors::counted();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("echo.socket");
    let mut world = World::new();
    world.script(echo);
    listen(&mut world, path.as_path()).unwrap();

    let mut peer = peer(&path);
    peer.write_all(b"over a file").unwrap();
    world.until("the echo", |world| world.service.count(|e| matches!(e, Event::Data(..))) > 0);
    let mut answer = [0; 11];
    peer.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"over a file");

    drop(peer);
    let token = world.service.opened()[0];
    assert_eq!(world.until_closed(token), Why::PeerClosed);
}

#[test]
fn the_reactor_connects_to_an_abstract_name() {
    let _descriptors = Descriptors::counted();
    let name = unique_name("abstract");
    let mut world = World::new();
    let address = Address::unix_abstract(name.as_str());
    listen(&mut world, address.clone()).unwrap();
    let options = ConnectOptions::default();
    let client = world.cx().connect(address, &options, Conn::Connecting).unwrap();
    world.cx().write(client, b"early").unwrap();
    world.until("both ends", |world| world.service.opened().len() == 2);
    let server = world.service.opened().into_iter().find(|&token| token != client).unwrap();
    world.until("the bytes", |world| world.service.data(server) == b"early");

    // A client outside of the reactor can connect too.
    let outsider = UnixAddr::from_abstract_name(name.as_bytes()).unwrap();
    UnixStream::connect_addr(&outsider).unwrap();
    world.until("the outside client", |world| world.service.opened().len() == 3);
}

#[test]
fn a_unix_connection_has_no_ip_address() {
    let _descriptors = Descriptors::counted();
    let address = Address::unix_abstract(unique_name("address"));
    let mut world = World::new();
    let listener = listen(&mut world, address.clone()).unwrap();
    let says_so = |result: Result<_, Error>| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("Unix-domain"), "{error}");
    };
    says_so(world.cx().listener_addr(listener));
    let options = ConnectOptions::default();
    let client = world.cx().connect(address, &options, Conn::Connecting).unwrap();
    world.until("both ends", |world| world.service.opened().len() == 2);
    for token in world.service.opened() {
        says_so(world.cx().peer_addr(token));
        says_so(world.cx().local_addr(token));
    }
    assert!(world.service.opened().contains(&client));
}

#[test]
fn a_stale_socket_file_prevents_listening_until_the_caller_removes_it() {
    let _descriptors = Descriptors::counted();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stale.socket");
    let mut world = World::new();
    let first = listen(&mut world, path.clone()).unwrap();
    world.cx().unlisten(first);
    assert!(path.exists(), "the reactor has removed the file");

    let refused = listen(&mut world, path.clone()).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::EADDRINUSE), "{refused}");
    let refused = world.cx().connect(path.clone(), &ConnectOptions::default(), Conn::Connecting);
    assert_eq!(refused.unwrap_err().error.errno(), Some(libc::ECONNREFUSED));

    std::fs::remove_file(&path).unwrap();
    listen(&mut world, path).unwrap();
}

#[test]
fn impossible_addresses_are_refused_at_once_without_leaks() {
    let _descriptors = Descriptors::counted();
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::new();
    let errno = |result: Result<ListenerId, Error>| result.unwrap_err().errno();
    let too_long = folder.path().join("x".repeat(120));
    assert_eq!(errno(listen(&mut world, too_long)), Some(libc::ENAMETOOLONG));
    assert_eq!(errno(listen(&mut world, Path::new(""))), Some(libc::ENOENT));

    let missing = folder.path().join("missing");
    let options = ConnectOptions::default();
    let refused =
        world.cx().connect(missing.clone(), &options, Conn::Connecting).unwrap_err().error;
    assert_eq!(refused.errno(), Some(libc::ENOENT), "{refused}");
    let options = ConnectOptions { source: Some(LOOPBACK), ..Default::default() };
    let refused = world.cx().connect(missing, &options, Conn::Connecting).unwrap_err().error;
    assert!(matches!(refused, Error::Invalid(_)), "{refused}");
    assert_eq!(world.cx().connections(), 0);
}

#[test]
fn options_of_tcp_are_ignored() {
    let _descriptors = Descriptors::counted();
    let address = Address::unix_abstract(unique_name("options"));
    let mut world = World::new();
    let options = ListenOptions {
        reuse_port: true,
        only_v6: true,
        keepalive: Some(Default::default()),
        user_timeout: Some(DEADLINE),
        ..Default::default()
    };
    world.cx().listen(address.clone(), &options).unwrap();
    let options = ConnectOptions {
        port_range: Some(2000..=3000),
        nodelay: true,
        keepalive: Some(Default::default()),
        user_timeout: Some(DEADLINE),
        timeout: Some(DEADLINE),
        ..Default::default()
    };
    world.cx().connect(address, &options, Conn::Connecting).unwrap();
    world.until("both ends", |world| world.service.opened().len() == 2);
}

#[test]
fn a_full_backlog_is_reported_at_once() {
    let _descriptors = Descriptors::counted();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("full.socket");
    let mut world = World::new();
    // A listener that never accepts; the kernel queues backlog + 1 peers.
    let options = ListenOptions { backlog: Some(0), ..Default::default() };
    let listener = world.cx().listen(path.clone(), &options).unwrap();
    world.cx().pause_accepts(listener).unwrap();
    let options = ConnectOptions::default();
    world.cx().connect(path.clone(), &options, Conn::Connecting).unwrap();
    let refused = world.cx().connect(path, &options, Conn::Connecting).unwrap_err().error;
    assert_eq!(refused.errno(), Some(libc::EAGAIN), "{refused}");

    world.cx().resume_accepts(listener).unwrap();
    world.until("both ends of the first", |world| world.service.opened().len() == 2);
}

#[test]
fn a_half_close_and_an_abort_arrive() {
    let _descriptors = Descriptors::counted();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("half.socket");
    let outside = UnixListener::bind(&path).unwrap();
    let mut world = World::new();
    world.script(|cx, event| {
        if let Event::Open(token) = event {
            cx.write(*token, b"last words").unwrap();
            cx.finish(*token);
        }
    });
    let options = ConnectOptions::default();
    let token = world.cx().connect(path.clone(), &options, Conn::Connecting).unwrap();
    let (mut other, _) = outside.accept().unwrap();
    other.set_read_timeout(Some(DEADLINE)).unwrap();
    world.until("the open", |world| world.service.opened().contains(&token));
    let mut words = String::new();
    other.read_to_string(&mut words).unwrap();
    assert_eq!(words, "last words");
    other.write_all(b"heard").unwrap();
    drop(other);
    assert_eq!(world.until_closed(token), Why::Finished);
    assert_eq!(world.service.data(token), b"heard");

    let token = world.cx().connect(path, &options, Conn::Connecting).unwrap();
    let (_other, _) = outside.accept().unwrap();
    world.until("the open", |world| world.service.opened().contains(&token));
    world.cx().abort(token);
    assert_eq!(world.until_closed(token), Why::Aborted);
}
