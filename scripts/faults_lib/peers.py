"""Many connections at once, each of which says something and knows what it must hear."""

import collections
import errno
import select
import socket
import struct
import time

RESET = struct.pack("ii", 1, 0)
IN_FLIGHT = 500


class Peer:
    __slots__ = ("stream", "state", "awaited")

    def __init__(self, stream):
        self.stream, self.state, self.awaited = stream, "connecting", b""


class Crowd:
    """Peers by descriptor; `open` are those whose last echo came back whole."""

    def __init__(self, address_of):
        self.address_of = address_of
        self.epoll = select.epoll()
        self.peers = {}
        self.started = 0
        self.gone = collections.Counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
        self.epoll.close()

    def count(self, state):
        return sum(peer.state == state for peer in self.peers.values())

    def add(self, count, patience=5.0, in_flight=IN_FLIGHT, at_most=120.0):
        """Connects so many; returns when all are answered, or when nothing has happened for a while."""
        left = count
        active = 0
        deadline = time.monotonic() + at_most
        quiet_since = time.monotonic()
        while (left or active) and time.monotonic() < deadline:
            while left and active < in_flight:
                left -= 1
                active += self.start()
            done = self.step(0.05)
            active -= done
            if done:
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > patience:
                if not left:
                    break
                # Those who wait in a backlog are no longer under way.
                active, quiet_since = 0, time.monotonic()

    def start(self):
        stream = socket.socket()
        stream.setblocking(False)
        result = stream.connect_ex(self.address_of(self.started))
        self.started += 1
        if result not in (0, errno.EINPROGRESS):
            self.gone[errno.errorcode[result]] += 1
            stream.close()
            return 0
        self.peers[stream.fileno()] = Peer(stream)
        self.epoll.register(stream.fileno(), select.EPOLLOUT)
        return 1

    def step(self, seconds):
        """Takes what has happened; returns how many were answered."""
        answered = 0
        for descriptor, events in self.epoll.poll(seconds, 1000):
            answered += self.advance(descriptor, events)
        return answered

    def advance(self, descriptor, events):
        peer = self.peers[descriptor]
        try:
            if peer.state == "connecting":
                error = peer.stream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, "connect")
                self.say(peer, b"Hello Server, connections num:%d" % descriptor)
                self.epoll.modify(descriptor, select.EPOLLIN)
                return 0
            heard = peer.stream.recv(65536)
            if not heard:
                raise OSError(errno.EPIPE, "closed")
        except BlockingIOError:
            return 0
        except OSError as error:
            was_open = peer.state == "open"
            self.forget(descriptor)
            reason = errno.errorcode.get(error.errno, str(error))
            self.gone[("lost:" if was_open else "") + reason] += 1
            return int(not was_open)
        return self.hear(peer, heard)

    def say(self, peer, message):
        peer.state, peer.awaited = "waiting", message
        peer.stream.send(message)

    def hear(self, peer, heard):
        if not peer.awaited.startswith(heard):
            self.gone["wrong echo"] += 1
        peer.awaited = peer.awaited[len(heard):]
        if peer.awaited or peer.state != "waiting":
            return 0
        peer.state = "open"
        return 1

    def prove(self, patience=20.0):
        """Says something on each open connection; returns how many echoes came back."""
        return self.hear_all(self.ask(), patience)

    def ask(self, most=None):
        """Says something on each open connection, or on so many of the newest, and returns them."""
        asked = [peer for peer in self.peers.values() if peer.state == "open"]
        asked = asked[-most:] if most else asked
        for number, peer in enumerate(asked):
            try:
                self.say(peer, b"still there, number %d?" % number)
            except OSError:
                pass
            if number % 200 == 0:
                self.step(0)
        return asked

    def hear_all(self, asked, patience):
        """Waits for their echoes; returns how many came back."""
        deadline = time.monotonic() + patience
        while any(peer.state == "waiting" for peer in asked) and time.monotonic() < deadline:
            self.step(0.05)
        return sum(peer.state == "open" for peer in asked)

    def settle(self, seconds):
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.step(min(left, 0.1))

    def forget(self, descriptor):
        # Closing takes it out of epoll.
        self.peers.pop(descriptor).stream.close()

    def close(self, count=None, reset=False, state=None):
        """Closes so many, oldest first; with a reset where that is wanted."""
        chosen = [d for d, peer in self.peers.items() if state in (None, peer.state)][:count]
        for descriptor in chosen:
            if reset:
                stream = self.peers[descriptor].stream
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.forget(descriptor)
        return len(chosen)


def connect(address, timeout=30.0):
    stream = socket.create_connection(address, timeout=timeout)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return stream


def echo(stream, message):
    """Whether the same bytes come back."""
    stream.sendall(message)
    return receive(stream, len(message)) == message


def receive(stream, count):
    heard = bytearray()
    while len(heard) < count:
        part = stream.recv(min(count - len(heard), 1 << 20))
        if not part:
            break
        heard += part
    return bytes(heard)


def admitted(address):
    """Whether a new connection gets its echo."""
    try:
        with connect(address, 5) as stream:
            return echo(stream, b"anybody there?")
    except OSError:
        return False
