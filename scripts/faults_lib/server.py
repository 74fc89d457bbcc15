"""The server under test: started, looked at from outside, stopped; never left behind."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

READY_SECONDS = 30
END_SECONDS = 60
PORTS = 10


def binary(name):
    return str(Path(os.environ["FAULTS_BINARIES"]) / name)


class Server:
    """A running server, and the bystander on the last of its ports."""

    def __init__(self, *arguments, namespace=None, cgroup=None, descriptors=None, bind="127.0.0.1",
                 first_port=None, bystander=True, environment=None):
        self.folder = tempfile.TemporaryDirectory(prefix="faults-")
        self.record_path = Path(self.folder.name) / "record.json"
        self.log_path = Path(self.folder.name) / "log"
        self.bind = bind
        self.first_port = first_port or free_ports(PORTS)
        self.namespace = namespace
        self.bystander = None
        self.command = [
            binary("c1000k-server"), "--bind", bind, "--first-port", str(self.first_port),
            "--ports", str(PORTS), "--json", str(self.record_path), *arguments,
        ]
        if "--file-table" not in arguments:
            self.command += ["--file-table", os.environ.get("FAULTS_FILE_TABLE", "auto")]
        prefix = ["ip", "netns", "exec", namespace] if namespace else []

        def prepare():
            if cgroup:
                (cgroup / "cgroup.procs").write_text(str(os.getpid()))
            if descriptors:
                resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                prefix + self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=prepare, env={**os.environ, **(environment or {})},
            )
        try:
            wait_until(self.is_ready, READY_SECONDS, "the server is ready")
            if bystander:
                self.bystander = Bystander(bind, self.first_port + PORTS - 1, self.process.pid, namespace)
        except BaseException:
            self.clean()
            raise

    def is_ready(self):
        if self.process.poll() is not None:
            raise RuntimeError(f"the server did not start: {self.log().strip()[-300:]}")
        return "ready: " in self.log()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.clean()

    def clean(self):
        if self.bystander:
            self.bystander.kill()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def address(self, index):
        """The bystander has the last port for itself."""
        return (self.bind, self.first_port + index % (PORTS - 1))

    def log(self):
        return self.log_path.read_text(errors="replace")

    def warnings(self):
        return [line for line in self.log().splitlines() if " WARN " in line or "ERROR" in line]

    def descriptors(self):
        """Files it has open, registered ones too, without its rings, which it makes as it needs them, and without those
        of /proc that it reads for a moment now and then."""
        counts = []
        for _ in range(5):
            counts.append(len(os.listdir(f"/proc/{self.process.pid}/fd")))
            time.sleep(0.001)
        return min(counts) - len(self.rings()) + self.registered_sockets()

    def registered_sockets(self):
        """Sockets in the tables of its rings."""
        folder = Path(f"/proc/{self.process.pid}/fdinfo")
        return sum(sockets_listed(folder / ring) for ring in self.rings())

    def rings(self):
        folder = Path(f"/proc/{self.process.pid}/fd")
        return [fd.name for fd in folder.iterdir() if target_of(fd) == "anon_inode:[io_uring]"]

    def rss_bytes(self):
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    def wakes(self):
        """How often it has gone to sleep so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("voluntary_ctxt"))
        return int(line.split()[1])

    def cpu_seconds(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def send(self, number):
        self.process.send_signal(number)

    def end(self, number=signal.SIGTERM):
        """Ends it and returns its exit code, its record and how long that took."""
        bystander = self.bystander and self.bystander.end()
        started = time.monotonic()
        self.send(number)
        code = self.process.wait(END_SECONDS)
        seconds = time.monotonic() - started
        record = json.loads(self.record_path.read_text()) if self.record_path.exists() else None
        if record:
            record.pop("series", None)
        return Ended(code, record, seconds, bystander)


class Ended:
    def __init__(self, code, record, seconds, bystander):
        self.code, self.record, self.seconds, self.bystander = code, record, seconds, bystander


class Bystander:
    def __init__(self, host, port, server_pid, namespace=None):
        prefix = ["ip", "netns", "exec", namespace] if namespace else []
        script = str(Path(__file__).with_name("bystander.py"))
        self.process = subprocess.Popen(
            [*prefix, sys.executable, script, host, str(port), str(server_pid)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        if self.process.stdout.readline() != b"ready\n":
            raise RuntimeError("the bystander got no echo")

    def end(self):
        """Tells what it has seen."""
        try:
            output, _ = self.process.communicate(b"\n", timeout=40)
            return json.loads(output)
        except (subprocess.TimeoutExpired, ValueError):
            return {"echoes": 0, "max_ms": None, "max_ms_without_waits_for_a_processor": None, "oversleep_max_ms": 0, "lost": "it hangs"}
        finally:
            self.kill()

    def pause(self):
        """Its echoes wake the server too."""
        self.process.send_signal(signal.SIGUSR1)

    def resume(self):
        self.process.send_signal(signal.SIGUSR2)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def target_of(link):
    """Where it leads; nowhere, if it is gone by now."""
    try:
        return os.readlink(link)
    except OSError:
        return None


def sockets_listed(ring):
    """The kernel lists the files of a ring that is not at work just then."""
    for _ in range(1_000):
        text = ring.read_text()
        if "UserFiles:" in text:
            return len(re.findall("^ *[0-9]+: socket:", text, re.MULTILINE))
        time.sleep(0.001)
    raise TimeoutError("a ring is always at work")


def free_ports(count):
    """The first of so many ports in a row that nobody listens on."""
    for first in range(21_000 + os.getpid() % 100 * 40, 32_000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("0.0.0.0", port))
            return first
        except OSError:
            continue
    raise RuntimeError(f"no {count} free ports in a row")


def wait_until(holds, seconds, what):
    """Waits for it and says how long that took."""
    started = time.monotonic()
    while not holds():
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(0.01)
    return time.monotonic() - started
