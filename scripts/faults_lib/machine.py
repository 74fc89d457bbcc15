"""What a row borrows from the machine, and gives back: a memory cgroup, a network namespace, forged packets."""

import ipaddress
import itertools
import os
import random
import socket
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from .runner import Skipped

NUMBERS = itertools.count()
CGROUPS = Path("/sys/fs/cgroup")


class MemoryCgroup:
    """A memory cgroup of its own, version 1 or 2."""

    def __init__(self, limit_bytes):
        version_1 = CGROUPS / "memory"
        self.version = 1 if version_1.is_dir() else 2
        self.path = (version_1 if self.version == 1 else CGROUPS) / f"c1000k-faults-{os.getpid()}"
        limit = "memory.limit_in_bytes" if self.version == 1 else "memory.max"
        try:
            self.path.mkdir()
            (self.path / limit).write_text(str(limit_bytes))
        except OSError as error:
            if self.path.is_dir():
                self.path.rmdir()
            raise Skipped(f"no memory cgroup can be made here: {error}") from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for _ in range(100):
            try:
                return self.path.rmdir()
            except OSError:
                time.sleep(0.1)

    def kills(self):
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        return self.value(name, "oom_kill")

    def peak_bytes(self):
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        file = self.path / name
        return int(file.read_text()) if file.exists() else None

    def value(self, file, key):
        for line in (self.path / file).read_text().splitlines():
            if line.split()[0] == key:
                return int(line.split()[1])
        raise KeyError(key)


class FailingCalls:
    """A library that makes accept4 or epoll_ctl fail in the process that it is preloaded into."""

    CALLS = ("accept4", "epoll_ctl")

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="faults-")
        library, switch = Path(self.folder.name) / "failing.so", Path(self.folder.name) / "switch"
        source = Path(__file__).with_name("failing.c")
        try:
            subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Skipped(f"no C compiler works here: {error}") from error
        switch.write_bytes(bytes(8))
        self.switch = switch
        self.environment = {"LD_PRELOAD": str(library), "FAULTS_SWITCH": str(switch)}

    def fail(self, call=None, error=0):
        values = [error if call == name else 0 for name in self.CALLS]
        with open(self.switch, "r+b") as switch:
            switch.write(struct.pack("2i", *values))


class Namespace:
    """A network namespace, joined to this one by a link: `outer` here, `inner` there."""

    def __init__(self):
        number = (os.getpid() * 16 + next(NUMBERS)) % 4_000
        self.name = f"c1000k-faults-{number}"
        self.device = f"c1kf{number}"
        first = ipaddress.ip_address("198.18.0.0") + 4 * number
        self.outer, self.inner = str(first + 1), str(first + 2)
        try:
            ip("netns", "add", self.name)
            ip("link", "add", self.device, "type", "veth", "peer", "name", "inside", "netns", self.name)
            ip("addr", "add", f"{self.outer}/30", "dev", self.device)
            ip("-n", self.name, "addr", "add", f"{self.inner}/30", "dev", "inside")
            ip("link", "set", self.device, "up")
            ip("-n", self.name, "link", "set", "lo", "up")
            self.link("up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            why = getattr(error, "stderr", b"") or str(error).encode()
            raise Skipped(f"no network namespace here: {why.decode().strip()}") from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        subprocess.run(["ip", "netns", "del", self.name], stderr=subprocess.DEVNULL, check=False)

    def link(self, state):
        # The far end: this one keeps its route, so that nothing leaves by another way meanwhile.
        ip("-n", self.name, "link", "set", "inside", state)
        if state == "up":
            # Forged addresses get their answers sent, to nowhere.
            ip("-n", self.name, "route", "replace", "default", "via", self.outer)

    def vanish(self):
        """Whoever is out here answers no more, and nobody is told: frames go to a card that is not there."""
        card = Path(f"/sys/class/net/{self.device}/address").read_text().strip()
        ip("-n", self.name, "neigh", "replace", self.outer, "lladdr", card, "dev", "inside", "nud", "permanent")
        ip("link", "set", self.device, "address", "02:c1:00:00:00:01")

    def set(self, setting, value):
        """Sets what is the namespace's own."""
        subprocess.run(
            ["ip", "netns", "exec", self.name, "sysctl", "-qw", f"{setting}={value}"], check=True)

    def counters(self):
        """The namespace's own TCP counters."""
        text = subprocess.run(
            ["ip", "netns", "exec", self.name, "cat", "/proc/net/netstat"],
            capture_output=True, text=True, check=True).stdout
        lines = [line.split() for line in text.splitlines() if line.startswith("TcpExt:")]
        return dict(zip(lines[0][1:], map(int, lines[1][1:])))


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def send_syns(space, address, count):
    """SYNs of peers that do not exist, over the link."""
    source_random = random.Random(1)
    port = address[1]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for _ in range(count):
            # 198.19/16 is for benchmarks too, and nobody has it.
            source = bytes((198, 19, source_random.randrange(256), source_random.randrange(1, 255)))
            try:
                raw.sendto(syn(source, socket.inet_aton(address[0]), source_random.randrange(1024, 65535), port), (address[0], 0))
            except BlockingIOError:
                time.sleep(0.001)


def syn(source, destination, source_port, port):
    header = struct.pack("!HHIIBBHHH", source_port, port, 1, 0, 5 << 4, 2, 64_000, 0, 0)
    pseudo = source + destination + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(header))
    header = header[:16] + struct.pack("!H", checksum(pseudo + header)) + header[18:]
    first = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, socket.IPPROTO_TCP, 0)
    return first + source + destination + header


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF
