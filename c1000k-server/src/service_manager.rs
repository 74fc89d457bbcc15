//! What a service manager passes to the server and hears of it: sockets that listen already (`LISTEN_FDS`), and when it is
//! ready and when it stops (`NOTIFY_SOCKET`).

use std::net::{SocketAddr, TcpListener};

use listenfd::ListenFd;
use sd_notify::NotifyState;

use crate::args::Settings;

/// The sockets that were passed, in the order of their ports; none where the server is to listen itself.
///
/// # Errors
/// One line: what is wrong with them.
pub(crate) fn passed_sockets() -> Result<Vec<TcpListener>, String> {
    let mut passed = ListenFd::from_env();
    let mut sockets = Vec::new();
    for index in 0..passed.len() {
        let socket = passed.take_tcp_listener(index);
        sockets.extend(socket.map_err(|error| format!("a socket of LISTEN_FDS: {error}"))?);
    }
    sockets.sort_by_key(|socket| socket.local_addr().map(|address| address.port()).unwrap_or(0));
    Ok(sockets)
}

/// The settings of a server that listens on these sockets.
///
/// # Errors
/// One line: why it can't.
pub(crate) fn settings_for(
    settings: &Settings,
    sockets: &[TcpListener],
) -> Result<Settings, String> {
    let addresses: Result<Vec<SocketAddr>, _> =
        sockets.iter().map(TcpListener::local_addr).collect();
    let addresses = addresses.map_err(|error| format!("a socket of LISTEN_FDS: {error}"))?;
    let mut settings = settings.clone();
    let Some(&first) = addresses.first() else { return Ok(settings) };
    if settings.threads > 1 {
        return Err("the sockets of LISTEN_FDS are for one reactor: leave out --threads".to_owned());
    }
    settings.bind = first.into();
    settings.first_port = first.port();
    settings.ports = u16::try_from(addresses.len()).unwrap_or(u16::MAX);
    settings.are_sockets_passed = true;
    let in_a_row = addresses.iter().zip(first.port()..=u16::MAX);
    let expected = in_a_row.filter(|(address, port)| **address == settings.bind.socket_addr(*port));
    if expected.count() < addresses.len() {
        return Err(format!(
            "the sockets of LISTEN_FDS are not of one address and ports in a row: {addresses:?}"
        ));
    }
    Ok(settings)
}

/// Tells the service manager, if there is one, that the server listens.
pub(crate) fn notify_ready() {
    notify(NotifyState::Ready);
}

/// Tells it that the server has begun to end.
pub(crate) fn notify_stopping() {
    notify(NotifyState::Stopping);
}

fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        log::warn!("the service manager can't be notified: {error}");
    }
}
