//! Outbound connections, and inserting any connection into epoll and the slab.

use std::net::SocketAddr;

use crate::address::Address;
use crate::config::ConnectOptions;
use crate::connection::{ConnHeader, Flags};
use crate::context::{Context, set_tcp_options};
use crate::error::{Error, Refused};
use crate::sys::{self, Descriptor, Readiness, Socket, Sockets};
use crate::token::{EventSource, Token};

impl<C> Context<C> {
    /// Starts a connect; `conn` is the state of the new connection.
    ///
    /// [`on_open`](crate::Handler::on_open) is called when it completes, or [`on_close`](crate::Handler::on_close) if
    /// it fails later. Bytes may be written at once: they are queued until the connection is open. Makes the system
    /// calls `socket`, `connect` and `epoll_ctl`, and one more for each option that is set.
    ///
    /// # Errors
    /// [`Error::Full`] at [`Config::connections_max`](crate::Config::connections_max); [`Error::Invalid`] during a
    /// [`shutdown`](Self::shutdown); and immediate system errors: no descriptor (`EMFILE`, `ENFILE`), no port, or a
    /// source address that is not of this machine (`EADDRNOTAVAIL`), no route (`ENETUNREACH`), no epoll watch
    /// (`ENOSPC`). A Unix-domain connect always fails immediately if it fails: no listener (`ECONNREFUSED`), no such
    /// file (`ENOENT`), a full backlog (`EAGAIN`). All errors return the state, and no callback follows.
    pub fn connect(
        &mut self,
        address: impl Into<Address>,
        options: &ConnectOptions,
        conn: C,
    ) -> Result<Token, Refused<C>> {
        match self.begin_connect(&address.into(), options) {
            Ok(token) => {
                self.give_back(token, conn);
                if let Some(timeout) = options.timeout {
                    self.set_timeout(token, timeout);
                }
                Ok(token)
            }
            Err(error) => Err(Refused { error, given: conn }),
        }
    }

    fn begin_connect(
        &mut self,
        address: &Address,
        options: &ConnectOptions,
    ) -> Result<Token, Error> {
        self.refuse_while_shutting_down()?;
        if let Some(error) = self.lacks_slot() {
            return Err(error);
        }
        let socket = match prepared(&self.sockets, address, options) {
            Err(error) if error.is_out_of_descriptors() && self.free_descriptors() => {
                prepared(&self.sockets, address, options)
            }
            other => other,
        }?;
        match sys::connect(&socket, address) {
            // The port may still be used by a socket that is closed only at the end of the callback or of the turn.
            Err(error)
                if error.is_out_of_ports()
                    && (self.close_leaving() || self.sockets.has_closes()) =>
            {
                self.flush();
                sys::connect(&socket, address)?;
            }
            connected => connected?,
        }
        Ok(self.insert_outbound(socket, address.is_tcp())?)
    }

    /// Registers a connection with epoll and gives it a slot, with its state lent from the start.
    #[inline(always)] // Otherwise it is not inlined, and costs a call per accept.
    pub(crate) fn insert(
        &mut self,
        socket: Descriptor,
        flags: Flags,
    ) -> Result<Token, Refused<Descriptor>> {
        let limit = self.connections.capacity();
        let Some(vacancy) = self.connections.vacancy() else {
            return Err(Refused {
                error: Error::Full { what: "connections", limit },
                given: socket,
            });
        };
        let token = Token::from(vacancy.key());
        let data = EventSource::Connection(token).to_bits();
        if let Err(error) = self.poller.add_connection(&socket, data) {
            return Err(Refused { error, given: socket });
        }
        vacancy.insert_lent(ConnHeader::new(Socket::from(socket), flags));
        self.move_later(token);
        Ok(token)
    }

    /// Does the same for an outbound connect or an adopted socket.
    pub(super) fn insert_outbound(
        &mut self,
        socket: Descriptor,
        is_tcp: bool,
    ) -> Result<Token, Refused<Descriptor>> {
        let flags = Flags::CONNECTING | Flags::OUTBOUND | input_flags(is_tcp);
        let token = self.insert(socket, flags)?;
        self.outbound += 1;
        Ok(token)
    }

    /// The connect has completed or failed; returns the error if it failed.
    pub(crate) fn finish_connect(&mut self, token: Token, ready: Readiness) -> Result<(), Error> {
        let header = self.connections.head_mut(token.key()).ok_or(Error::Stale)?;
        if (ready.is_error() || ready.is_hangup())
            && let Some(error) = self.sockets.take_error(&header.socket, "connect")
        {
            return Err(error);
        }
        header.flags.set(Flags::CONNECTING, false);
        let finishes = header.flags.any(Flags::FINISHING) && !header.has_queue();
        self.clear_timeout(token);
        if finishes {
            self.finish_now(token);
        }
        Ok(())
    }
}

/// The initial flags for a connection's input: on a Unix-domain stream a read stops where the peer has sent
/// descriptors, so a short read does not mean that the input is exhausted.
pub(super) fn input_flags(is_tcp: bool) -> Flags {
    if is_tcp { Flags::NONE } else { Flags::READ_TO_END }
}

fn prepared(
    sockets: &Sockets,
    address: &Address,
    options: &ConnectOptions,
) -> Result<Descriptor, Error> {
    if options.source.is_some_and(|source| !is_of_family(address, source)) {
        return Err(Error::Invalid(
            "the source address and the destination are of different address families",
        ));
    }
    let socket = sockets.stream_socket(address)?;
    if !address.is_tcp() {
        return Ok(socket);
    }
    if let Some(range) = &options.port_range {
        if range.is_empty() {
            return Err(Error::Invalid("the port range is empty"));
        }
        sys::set_port_range(&socket, range)?;
    }
    if let Some(source) = options.source {
        if source.port() == 0 {
            sys::defer_source_port(&socket)?;
        }
        sys::bind(&socket, &Address::Ip(source))?;
    }
    set_tcp_options(&socket, &options.tcp())?;
    Ok(socket)
}

fn is_of_family(address: &Address, source: SocketAddr) -> bool {
    matches!(address, Address::Ip(ip) if ip.is_ipv4() == source.is_ipv4())
}
