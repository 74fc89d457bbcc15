"""The faults, each with what must hold: the rows of docs/reliability.md."""

import errno
import json
import random
import resource
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from . import machine, peers
from .runner import Skipped
from .server import PORTS, Server, binary, wait_until

ROWS = []
MANY = 15_000


class Row:
    def __init__(self, name, fault, must_hold, when_named, play):
        self.name, self.fault, self.must_hold, self.when_named, self.play = name, fault, must_hold, when_named, play


def row(name, fault, must_hold, when_named=False):
    """`when_named`: it takes minutes, and is not played unless it is asked for."""
    def add(play):
        ROWS.append(Row(name, fault, must_hold, when_named, play))
        return play
    return add


def many(count):
    """Skips where this process may not have so many descriptors."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed < count + 200:
        raise Skipped(f"{count:,} clients want as many descriptors, and RLIMIT_NOFILE allows {allowed:,}")
    return count


def wakes_per_second(server, crowd=None, seconds=3.0):
    before, started = server.wakes(), time.monotonic()
    crowd.settle(seconds) if crowd else time.sleep(seconds)
    return round((server.wakes() - before) / (time.monotonic() - started), 1)


def gone_again(run, server, descriptors_before, seconds=20):
    """All descriptors but those from before are closed."""
    took = wait_until(lambda: server.descriptors() <= descriptors_before, seconds, "no descriptor leaked")
    run.figure(cleared_seconds=round(took, 2))
    run.check("no descriptor leaked", True)


@row("descriptors", "RLIMIT_NOFILE 200 from the start, 5,000 clients",
     "holds all it can, refuses the rest, idles, and takes new ones as soon as old ones leave")
def descriptors(run):
    with Server("--file-table", "process", descriptors=200) as server, peers.Crowd(server.address) as crowd:
        crowd.add(many(5_000))
        held, refused = crowd.count("open"), crowd.gone["ECONNRESET"]
        run.figure(held=held, refused=refused)
        run.check("as many as fit are held", held == 200 - PORTS - 32 - 1)
        run.check("all others were reset", refused == 5_000 - held)
        server.bystander.pause()
        run.figure(wakes_per_second=wakes_per_second(server, crowd))
        server.bystander.resume()
        run.check("it wakes a few times a second", run.figures["wakes_per_second"] < 20)
        crowd.close(50)
        took = wait_until(lambda: peers.admitted(server.address(0)), 5, "new ones are taken")
        crowd.add(40)
        run.figure(room_again_seconds=round(took, 2), held_again=crowd.count("open"))
        run.check("new ones are taken within a second", took < 1)
        run.check("all held ones still echo", crowd.prove() == held - 50 + 40)
        crowd.close()
        record = run.ends(server)
        run.check("the record counts the refusals", record["refused_by"].get("max_connections", 0) >= refused)


@row("registered-files", "RLIMIT_NOFILE 200 from the start, 5,000 clients, registered files",
     "holds all of them, and leaves none in a table")
def registered_files(run):
    with Server(descriptors=200) as server, peers.Crowd(server.address) as crowd:
        if "registered files" not in server.log():
            raise Skipped("io_uring is not to be had here")
        before = server.registered_sockets()
        crowd.add(many(5_000))
        run.figure(held=crowd.count("open"))
        run.check("all are held", crowd.count("open") == 5_000)
        run.check("all of them echo", crowd.prove() == 5_000)
        run.check("none is a descriptor", server.registered_sockets() == before + 5_000)
        crowd.close(reset=True)
        took = wait_until(lambda: server.registered_sockets() == before, 20, "no slot of a table leaked")
        run.figure(cleared_seconds=round(took, 2))
        run.ends(server)


@row("descriptors-lowered", "RLIMIT_NOFILE lowered to 200 while it runs: EMFILE on accept, 5,000 clients",
     "the same, with those that wait served as soon as others leave")
def descriptors_lowered(run):
    with Server("--file-table", "process") as server, peers.Crowd(server.address) as crowd:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (200, 200))
        crowd.add(many(5_000), in_flight=5_000, at_most=5)
        held, waiting = crowd.count("open"), crowd.count("waiting") + crowd.count("connecting")
        run.figure(held=held, waiting=waiting, reset=crowd.gone["ECONNRESET"])
        run.check("as many as fit are held", 200 - PORTS - 10 <= held < 200)
        cpu_before = server.cpu_seconds()
        server.bystander.pause()
        run.figure(wakes_per_second=wakes_per_second(server, crowd, 5))
        server.bystander.resume()
        run.figure(cpu_percent=round((server.cpu_seconds() - cpu_before) / 5 * 100, 1))
        run.check("it wakes a few times a second, not thousands", run.figures["wakes_per_second"] < 50)
        run.check("all held ones still echo", crowd.prove() >= held)
        held = crowd.count("open")
        started = time.monotonic()
        crowd.close(100, state="open")
        while crowd.count("open") < held - 10 and time.monotonic() - started < 10:
            crowd.step(0.05)
        run.figure(refilled=crowd.count("open"), refilled_seconds=round(time.monotonic() - started, 2))
        run.check("those that waited take the places", crowd.count("open") >= held - 10)
        crowd.close()
        record = run.ends(server)
        run.figure(accept_errors=str(record["accept_errors"]), accept_pauses=record["accept_pauses"])
        run.check("EMFILE is counted", record["accept_errors"].get("EMFILE", 0) > 0)


@row("exhausted", "ENFILE, ENOMEM, ENOBUFS on each accept, ENOSPC, ENOMEM on each epoll_ctl that adds (put in by a preloaded library)",
     "holds what it has, wakes a few times a second, and takes those that waited as soon as the fault is over")
def exhausted(run):
    calls = machine.FailingCalls()
    with Server(environment=calls.environment) as server, peers.Crowd(server.address) as crowd:
        crowd.add(200)
        for call, error in (("accept4", "ENFILE"), ("accept4", "ENOMEM"), ("accept4", "ENOBUFS"),
                            ("epoll_ctl", "ENOSPC"), ("epoll_ctl", "ENOMEM")):
            name = f"{error} on {call}"
            held, reset = crowd.count("open"), crowd.gone.total()
            calls.fail(call, getattr(errno, error))
            for _ in range(200):
                crowd.start()
            crowd.settle(1)
            server.bystander.pause()
            wakes = wakes_per_second(server, crowd)
            server.bystander.resume()
            run.check(f"{name}: it wakes a few times a second", wakes < 50)
            run.check(f"{name}: nobody gets in", crowd.count("open") == held)
            run.check(f"{name}: all held ones echo", crowd.prove() == held)
            calls.fail()
            started = time.monotonic()
            while crowd.count("waiting") + crowd.count("connecting") and time.monotonic() - started < 10:
                crowd.step(0.05)
            got_in, reset = crowd.count("open") - held, crowd.gone.total() - reset
            run.figure(**{name: f"{wakes} wakes/s, {reset} reset, {got_in} in {time.monotonic() - started:.2f} s after"})
            run.check(f"{name}: those that waited get in", got_in + reset == 200 and got_in > 0)
        crowd.close()
        record = run.ends(server, stall_ms_max=None)
        run.figure(accept_errors=str(record["accept_errors"]), refused_by=str(record["refused_by"]))
        for error in ("ENFILE", "ENOMEM", "ENOBUFS", "ENOSPC"):
            run.check(f"{error} is counted", record["accept_errors"].get(error, 0) > 0)


@row("memory-cgroup", "a memory cgroup of 12 MB, 18,000 clients",
     "not killed; each one admitted echoes; refusals are counted; when clients leave it admits again")
def memory_cgroup(run):
    with machine.MemoryCgroup(12 << 20) as cgroup, Server("--max-connections", "19000", cgroup=cgroup.path) as server:
        with peers.Crowd(server.address) as crowd:
            crowd.add(many(18_000))
            held, refused = crowd.count("open"), crowd.gone["ECONNRESET"]
            run.figure(held=held, refused=refused, peak_bytes=cgroup.peak_bytes(), kills=cgroup.kills())
            run.check("not killed", server.process.poll() is None and cgroup.kills() == 0)
            run.check("many are held", held > 3_000)
            run.check("all others were reset", held + refused == 18_000)
            run.check("each one admitted echoes", crowd.prove() == held)
            wait_until(lambda: "| refusing: memory" in server.log(), 10, "the status line says that memory is refused")
            crowd.close(held // 2)
            took = wait_until(lambda: peers.admitted(server.address(0)), 15, "it admits again")
            crowd.add(held // 4)
            run.figure(room_again_seconds=round(took, 2), held_again=crowd.count("open"))
            run.check("it admits again", crowd.count("open") > held - held // 2 + held // 8)
            run.check("all of them echo", crowd.prove() == crowd.count("open"))
        record = run.ends(server)
        run.figure(guard=str(record["memory_guard"]), kills_at_end=cgroup.kills())
        run.check("the record counts the refusals", record["refused_by"].get("memory", 0) >= refused)
        run.check("never killed", cgroup.kills() == 0)


@row("memory-pause", "the same with --overload pause", "the same, and peers wait instead of being reset")
def memory_pause(run):
    with machine.MemoryCgroup(12 << 20) as cgroup, Server(
            "--max-connections", "19000", "--overload", "pause", cgroup=cgroup.path) as server:
        with peers.Crowd(server.address) as crowd:
            crowd.add(many(18_000), patience=1.5, in_flight=2_000)
            held = crowd.count("open")
            waiting = crowd.count("waiting") + crowd.count("connecting")
            run.figure(held=held, waiting=waiting, kills=cgroup.kills(), reset=crowd.gone["ECONNRESET"])
            run.check("not killed", server.process.poll() is None and cgroup.kills() == 0)
            run.check("nobody is reset", not crowd.gone)
            run.check("each one admitted echoes", held > 3_000 and crowd.prove() == held)
            crowd.close(held // 2, state="open")
            deadline = time.monotonic() + 30
            while crowd.count("open") < held - held // 4 and time.monotonic() < deadline:
                crowd.step(0.1)
            run.figure(held_again=crowd.count("open"))
            run.check("those that waited get in", crowd.count("open") >= held - held // 4)
        run.ends(server)


@row("killed-clients", f"{MANY:,} clients killed with SIGKILL at once",
     "no leak of slot or descriptor; a bystander never stalls for 100 ms")
def killed_clients(run):
    with Server() as server, tempfile.TemporaryFile() as log:
        many(MANY)
        before = server.descriptors()
        client = subprocess.Popen(
            [binary("c1000k-client"), server.bind, str(server.first_port), "--ports", str(PORTS - 1),
             "-c", str(MANY), "--hold", "1h"], stdout=log, stderr=log)
        try:
            wait_until(lambda: server.descriptors() >= before + MANY, 120, "all are held")
        finally:
            client.kill()
            client.wait()
        gone_again(run, server, before)
        run.check("new ones are taken", peers.admitted(server.address(0)))
        run.ends(server)


@row("rst-burst", f"{MANY:,} connections reset in one burst", "the same")
def rst_burst(run):
    with Server() as server, peers.Crowd(server.address) as crowd:
        before = server.descriptors()
        crowd.add(many(MANY))
        run.figure(held=crowd.count("open"))
        run.check("all are held", crowd.count("open") == MANY)
        started = time.monotonic()
        crowd.close(reset=True)
        run.figure(burst_seconds=round(time.monotonic() - started, 2))
        gone_again(run, server, before)
        run.check("new ones are taken", peers.admitted(server.address(0)))
        run.ends(server)


@row("half-closes", "5,000 peers that send, half-close, and then read", "each gets its echo, then the end; no leak")
def half_closes(run):
    with Server() as server, peers.Crowd(server.address) as crowd:
        before = server.descriptors()
        crowd.add(many(5_000))
        ended = 0
        for descriptor, peer in list(crowd.peers.items()):
            peer.stream.send(b"last words")
            peer.stream.shutdown(socket.SHUT_WR)
        for descriptor, peer in list(crowd.peers.items()):
            peer.stream.settimeout(20)
            ended += peers.receive(peer.stream, 11) == b"last words"
        run.figure(ended=ended)
        run.check("each got the whole echo and the end", ended == 5_000)
        gone_again(run, server, before)
        run.ends(server)


@row("reset-before-accept", "2,000 connections reset before they are accepted (the server is stopped meanwhile)",
     "no leak, no error that stops it")
def reset_before_accept(run):
    with Server() as server, peers.Crowd(server.address) as crowd:
        before = server.descriptors()
        server.send(signal.SIGSTOP)
        for _ in range(2_000):
            crowd.start()
        crowd.settle(1)
        run.figure(connected=crowd.count("waiting"))
        run.check("all completed in the backlogs", crowd.count("waiting") == 2_000)
        crowd.close(reset=True)
        server.send(signal.SIGCONT)
        run.check("new ones are taken", peers.admitted(server.address(0)))
        gone_again(run, server, before)
        record = run.ends(server, stall_ms_max=None)
        run.figure(accepted=record["accepted"], accept_errors=str(record["accept_errors"]))


@row("slowloris", f"{MANY:,} peers that send one byte each second", "the bystander's latency and the memory stay bounded")
def slowloris(run):
    with Server() as server, peers.Crowd(server.address) as crowd:
        crowd.add(many(MANY))
        rss = server.rss_bytes()
        sent = 0
        for _ in range(8):
            started = time.monotonic()
            for number, peer in enumerate(list(crowd.peers.values())):
                sent += peer.stream.send(b"x")
                if number % 15 == 0:
                    time.sleep(max(0.0, started + number / MANY - time.monotonic()))
        heard = sum(len(peers.receive(peer_blocking(peer), 8)) for peer in crowd.peers.values())
        run.figure(sent=sent, heard=heard, process_grew_bytes=server.rss_bytes() - rss)
        run.check("each byte came back", heard == sent == 8 * MANY)
        run.check("the process grew by less than 1 MB", server.rss_bytes() - rss < 1 << 20)
        run.ends(server)


def peer_blocking(peer):
    peer.stream.settimeout(20)
    return peer.stream


@row("never-reading", "500 peers that send up to 1 MB and read nothing",
     "each costs a bounded queue, is dropped after --slow-reader-timeout, and harms nobody")
def never_reading(run):
    # At most 128 KiB and its overhead of the process each.
    closed_by = play_never_reading(run, 500, 64 << 10, 500 * (160 << 10))
    run.check("the record counts each of them", closed_by.get("slow_reader") == 500)


@row("never-reading-many", f"{MANY:,} peers that send up to 1 MB and read nothing",
     "all queues together are bounded, everybody is dropped and counted, and nobody else is harmed")
def never_reading_many(run):
    # 256 MiB of queues at the most, and as much again for what holds them.
    closed_by = play_never_reading(run, many(MANY), 16 << 10, 512 << 20)
    dropped = sum(closed_by.get(reason, 0) for reason in ("slow_reader", "queues_full", "tcp_mem"))
    run.check("the record counts each of them", dropped == MANY)


def play_never_reading(run, count, kernel_bytes, process_bytes_max):
    """What the record says of how they were dropped."""
    with machine.Namespace() as space, Server(
            "--slow-reader-timeout", "4s", namespace=space.name, bind=space.inner) as server:
        # Else the kernel takes megabytes for each of them before anything waits in the server.
        space.set("net.ipv4.tcp_rmem", f"4096 {kernel_bytes} {kernel_bytes}")
        space.set("net.ipv4.tcp_wmem", f"4096 {kernel_bytes} {kernel_bytes}")
        before, rss = server.descriptors(), server.rss_bytes()
        streams = []
        for number in range(count):
            stream = socket.socket()
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, kernel_bytes)
            stream.connect(server.address(number))
            stream.setblocking(False)
            streams.append(stream)
        sent = {stream: 0 for stream in streams}
        peak = 0
        for _ in range(12):
            for stream in streams:
                try:
                    while sent[stream] < 1 << 20:
                        sent[stream] += stream.send(b"x" * 65536)
                except OSError:
                    pass
            peak = max(peak, server.rss_bytes() - rss)
            time.sleep(0.1)
        run.figure(sent_bytes=sum(sent.values()), process_grew_bytes=peak)
        run.check("the process stays within its bounds", peak < process_bytes_max)
        took = wait_until(lambda: server.descriptors() <= before, 60, "they are dropped")
        run.figure(dropped_seconds=round(took, 2))
        for stream in streams:
            stream.close()
        closed_by = run.ends(server)["closed_by"]
        run.figure(closed_by=str(closed_by))
        return closed_by


@row("full-accept-queue", "5,000 connects at ports with a backlog of 16, the server stopped for 2 s",
     "the overflow is counted (ListenOverflows), reported and recovered from")
def full_accept_queue(run):
    many(5_000)
    with machine.Namespace() as space, Server("--backlog", "16", namespace=space.name, bind=space.inner) as server:
        with peers.Crowd(server.address) as crowd:
            server.send(signal.SIGSTOP)
            for _ in range(5_000):
                crowd.start()
            crowd.settle(2)
            server.send(signal.SIGCONT)
            started = time.monotonic()
            while crowd.count("open") < 5_000 and not crowd.gone and time.monotonic() - started < 60:
                crowd.step(0.1)
            run.figure(open=crowd.count("open"), recovered_seconds=round(time.monotonic() - started, 1))
            run.check("all get in in the end", crowd.count("open") == 5_000)
        record = run.ends(server, stall_ms_max=None)
        overflows = record["counters"].get("ListenOverflows", 0)
        run.figure(listen_overflows=overflows, listen_drops=record["counters"].get("ListenDrops", 0))
        run.check("the overflow is in the record", overflows > 0)


@row("syn-flood", "50,000 SYNs from forged addresses, as fast as they can be sent",
     "the bystander goes on, others get in meanwhile, and it recovers")
def syn_flood(run):
    with machine.Namespace() as space, Server(namespace=space.name, bind=space.inner) as server:
        before = server.descriptors()
        flood = threading.Thread(target=machine.send_syns, args=(space, server.address(0), 50_000))
        started = time.monotonic()
        flood.start()
        got_in, tried = 0, 0
        while flood.is_alive():
            got_in += peers.admitted(server.address(tried))
            tried += 1
            time.sleep(0.05)
        flood.join()
        run.figure(flood_seconds=round(time.monotonic() - started, 1), got_in=got_in, tried=tried)
        run.check("others get in during the flood", got_in >= 0.9 * tried > 0)
        run.check("and after it", peers.admitted(server.address(0)))
        gone_again(run, server, before)
        counters = space.counters()
        run.figure(syn_cookies_sent=counters["SyncookiesSent"], request_queue_full=counters["TCPReqQFullDoCookies"])
        run.check("the kernel saw a flood", counters["SyncookiesSent"] + counters["TCPReqQFullDrop"] > 0)
        run.ends(server)


@row("bytes", "random bytes on 20 connections, 1 GB on one, a million messages of one byte", "all of it is echoed right")
def odd_bytes(run):
    with Server() as server:
        for number in range(20):
            stream = peers.connect(server.address(number))
            message = random.Random(number).randbytes(1 + number * 39_989)
            run.check("random bytes come back" if number == 0 else f"and those of {len(message)} bytes", pump(stream, message, 1))
            stream.close()
        started = time.monotonic()
        block = random.Random(0).randbytes(1_000_000)
        right = pump(peers.connect(server.address(0)), block, 1_000)
        run.figure(gigabyte_seconds=round(time.monotonic() - started, 1))
        run.check("1 GB on one connection comes back", right)
        started = time.monotonic()
        stream = peers.connect(server.address(1))
        wrong = 0
        for _ in range(2_000):
            said = random.randbytes(500)
            for byte in said:
                stream.send(bytes((byte,)))
            wrong += peers.receive(stream, 500) != said
        run.figure(million_messages_seconds=round(time.monotonic() - started, 1))
        run.check("a million messages of one byte come back", wrong == 0)
        run.ends(server, stall_ms_max=None)


def pump(stream, block, times):
    """Sends and reads at once; whether the same came back."""
    def send():
        for _ in range(times):
            stream.sendall(block)
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    right = all(peers.receive(stream, len(block)) == block for _ in range(times))
    sender.join(10)
    return right


@row("sigterm-under-load", "SIGTERM with 1,000 busy connections and 50 whose output is queued",
     "everything that was read is handed over within the grace; exit code 0; the record is written")
def sigterm_under_load(run):
    with Server("--grace", "20s", bystander=False) as server, peers.Crowd(server.address) as crowd:
        crowd.add(1_000)
        slow = [peers.connect(server.address(number)) for number in range(50)]
        sent = [fill(stream, 3 << 20) for stream in slow]
        stop = threading.Event()
        talkers = threading.Thread(target=talk, args=(crowd, stop))
        talkers.start()
        time.sleep(1)
        server.send(signal.SIGTERM)
        started = time.monotonic()
        time.sleep(0.5)
        heard = []
        readers = [threading.Thread(target=lambda s=stream: heard.append(drain(s))) for stream in slow]
        [reader.start() for reader in readers]
        code = server.process.wait(60)
        run.figure(exit_code=code, seconds=round(time.monotonic() - started, 2))
        stop.set()
        talkers.join(30)
        [reader.join(30) for reader in readers]
        record = json.loads(server.record_path.read_text())
        run.figure(queued_senders=len(slow), sent_bytes=sum(sent), heard_bytes=sum(heard), bytes_in=record["bytes_in"], bytes_out=record["bytes_out"])
        run.check("exit code 0", code == 0)
        run.check("all that was read was sent back", record["bytes_in"] == record["bytes_out"])
        run.check("nothing was left open", record["open"] == 0 and record["accepted"] == record["closed"])
        run.figure(talked_bytes=crowd.talked)
        run.check("and all of it arrived", sum(heard) + crowd.talked == record["bytes_out"])


def fill(stream, most):
    """Writes until the server takes no more."""
    stream.setblocking(False)
    sent, quiet = 0, 0
    while sent < most and quiet < 10:
        try:
            sent += stream.send(b"q" * 65536)
            quiet = 0
        except BlockingIOError:
            quiet += 1
            time.sleep(0.01)
    stream.settimeout(30)
    return sent


def drain(stream):
    heard = 0
    try:
        while part := stream.recv(1 << 20):
            heard += len(part)
    except OSError:
        pass
    stream.close()
    return heard


def talk(crowd, stop):
    """Each of the crowd says something as soon as it has heard the last; all that is heard is counted."""
    crowd.talked = 0
    for descriptor, peer in crowd.peers.items():
        crowd.talked += len(b"Hello Server, connections num:%d" % descriptor)
        peer.stream.send(b"t" * 600)
    left = set(crowd.peers)
    deadline = time.monotonic() + 60
    while left and time.monotonic() < deadline:
        for descriptor, _ in crowd.epoll.poll(0.1, 1000):
            stream = crowd.peers[descriptor].stream
            try:
                heard = stream.recv(65536)
            except BlockingIOError:
                continue
            except OSError:
                heard = b""
            crowd.talked += len(heard)
            if not heard:
                left.discard(descriptor)
                crowd.forget(descriptor)
                continue
            try:
                stream.send(b"t" * 600)
            except OSError:
                pass


@row("sigkill-restart", "SIGKILL with 10,000 connections, then a restart", "listens again at once on the same ports")
def sigkill_restart(run):
    with Server(bystander=False) as server, peers.Crowd(server.address) as crowd:
        crowd.add(many(10_000))
        run.check("10,000 are held", crowd.count("open") == 10_000)
        server.process.kill()
        server.process.wait()
        started = time.monotonic()
        with Server(first_port=server.first_port) as again:
            run.check("serves", peers.admitted(again.address(0)))
            run.figure(serving_again_seconds=round(time.monotonic() - started, 2))
            time.sleep(0.5)
            run.ends(again)


@row("server-killed", "the server killed under a client that holds 10,000", "the client reports truly, within seconds")
def server_killed(run):
    with Server(bystander=False) as server, tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "client.json"
        log = open(Path(folder) / "log", "wb")
        many(10_000)
        before = server.descriptors()
        client = subprocess.Popen(
            [binary("c1000k-client"), server.bind, str(server.first_port), "--ports", str(PORTS),
             "-c", "10000", "--hold", "1h", "--json", str(record)], stdout=log, stderr=log)
        try:
            wait_until(lambda: server.descriptors() >= before + 10_000, 60, "all are held")
            time.sleep(1)
            server.process.kill()
            server.process.wait()
            started = time.monotonic()
            code = client.wait(30)
        finally:
            client.kill()
        told = json.loads(record.read_text())
        run.figure(client_exit=code, seconds=round(time.monotonic() - started, 2), lost=told["lost"], limit=told["limit"], verdict=told["verdict"])
        run.check("exit code 1, verdict short", code == 1 and told["verdict"] == "short")
        run.check("all are told as lost", told["lost"] == 10_000)
        run.check("the server is named", told["limit"] == "server")


@row("link-down", "the network link down for 5 s, and up again", "connections live on; the client reports truly and never hangs")
def link_down(run):
    with machine.Namespace() as space, Server(namespace=space.name, bind=space.inner) as server:
        with peers.Crowd(server.address) as crowd, tempfile.TemporaryDirectory() as folder:
            crowd.add(500)
            record = Path(folder) / "client.json"
            client = subprocess.Popen(
                [binary("c1000k-client"), space.inner, str(server.first_port), "--ports", str(PORTS - 1),
                 "-c", "2000", "--rate", "500", "--hold", "2s", "--json", str(record)],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                time.sleep(1.5)
                space.link("down")
                asked = crowd.ask()
                crowd.settle(5)
                run.check("nothing comes back while it is down", all(peer.state == "waiting" for peer in asked))
                space.link("up")
                started = time.monotonic()
                run.check("all echo again", crowd.hear_all(asked, 60) == 500)
                run.figure(echoing_again_seconds=round(time.monotonic() - started, 1))
                code = client.wait(90)
            finally:
                client.kill()
            told = json.loads(record.read_text())
            run.figure(client_exit=code, established=told["established"], verified=told["verified"], failed=told["failed"], retried=told["retried"], failures=str(told["failures"]), verdict=told["verdict"])
            run.check("the client's exit code is its verdict", (code == 0) == (told["verdict"] == "reached"))
            # A connect that meets the dead link is tried again, or ends the ramp where the kernel says EHOSTUNREACH.
            reached = told["established"] == told["verified"] == 2_000
            short = told["failed"] > 0 and sum(told["failures"].values()) == told["failed"]
            run.check("the client's figures add up", reached if code == 0 else short)
        run.ends(server, stall_ms_max=None)


@row("peer-machine-gone",
     "the machine of 1,000 peers vanishes without a word: 500 silent ones of a server with --keepalive 1s, and 500 with an answer under way of one with --tcp-user-timeout 3s",
     "each server finds out within the time given, and lets go of them")
def peer_machine_gone(run):
    with machine.Namespace() as space:
        place = {"namespace": space.name, "bind": space.inner}
        with Server("--keepalive", "1s", **place) as probing:
            with Server("--tcp-user-timeout", "3s", bystander=False, first_port=probing.first_port + 50, **place) as answering:
                machine_vanishes(run, space, probing, answering)
                aborted = space.counters()["TCPAbortOnTimeout"]
                run.figure(tcp_abort_on_timeout=aborted)
                run.check("the kernel counts each of them", aborted == 1_000)
                record = run.ends(probing)
                run.figure(closed_by=str(record["closed_by"]))
                run.check("so does the record", record["closed_by"].get("tcp_timeout") == 500)


def machine_vanishes(run, space, probing, answering):
    with peers.Crowd(probing.address) as silent, peers.Crowd(answering.address) as asking:
        before = {server: server.descriptors() for server in (probing, answering)}
        silent.add(500)
        asking.add(500)
        time.sleep(4)
        run.check("those who answer probes stay", probing.descriptors() == before[probing] + 500)
        answering.send(signal.SIGSTOP)
        asking.ask()
        time.sleep(0.2)
        space.vanish()
        vanished = time.monotonic()
        answering.send(signal.SIGCONT)
        took = {}
        while len(took) < 2 and time.monotonic() - vanished < 60:
            for server in (probing, answering):
                if server not in took and server.descriptors() <= before[server]:
                    took[server] = round(time.monotonic() - vanished, 1)
            time.sleep(0.02)
        run.figure(silent_gone_seconds=took.get(probing), answered_gone_seconds=took.get(answering))
        run.check("three unanswered probes, a second apart, end it", 2 <= took.get(probing, 0) <= 10)
        run.check("an answer that nobody takes ends it after 3 s", 2.9 <= took.get(answering, 0) <= 10)
        run.check("only their machine knows nothing of it", silent.count("open") == 500)


@row("suspended", "the server suspended for 12 s with 5,000 idle timeouts of 5 s due meanwhile (SIGSTOP, SIGCONT)",
     "each timeout fires once, without a storm")
def suspended(run):
    suspend(run, 12)


@row("suspended-minutes", "the same for 3 minutes", "the same", when_named=True)
def suspended_minutes(run):
    suspend(run, 180)


def suspend(run, seconds):
    with Server("--idle-timeout", "5s", bystander=False) as server, peers.Crowd(server.address) as crowd:
        before = server.descriptors()
        crowd.add(many(5_000))
        run.check("all are held", crowd.count("open") == 5_000)
        server.send(signal.SIGSTOP)
        time.sleep(seconds)
        cpu = server.cpu_seconds()
        server.send(signal.SIGCONT)
        gone_again(run, server, before)
        run.figure(cpu_seconds=round(server.cpu_seconds() - cpu, 2), wakes_per_second=wakes_per_second(server))
        run.check("no storm afterwards", run.figures["wakes_per_second"] < 20)
        record = run.ends(server)
        run.figure(closed_by=str(record["closed_by"]))
        run.check("each fired once", record["closed_by"] == {"idle": 5_000})
