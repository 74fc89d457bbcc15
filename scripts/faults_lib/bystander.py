"""A connection that has nothing to do with the fault and echoes all along: python3 bystander.py HOST PORT SERVER_PID.

Falls silent on SIGUSR1 and goes on after SIGUSR2. Ends when standard input does, and prints how long its echoes took.
What of a delay is the machine's and not the server's is told beside it: how long the server and this process waited
for a processor while they could have run, and how much too long this process slept.
"""

import json
import select
import signal
import socket
import sys
import time
from pathlib import Path

PAUSE = 0.002
MESSAGE = b"bystander" * 7


silent = False


def set_silent(number, _):
    global silent
    silent = number == signal.SIGUSR1


def main():
    signal.signal(signal.SIGUSR1, set_silent)
    signal.signal(signal.SIGUSR2, set_silent)
    address = (sys.argv[1], int(sys.argv[2]))
    schedules = [Path("/proc/self/schedstat"), Path(f"/proc/{sys.argv[3]}/schedstat")]
    echoes, oversleep, unexplained, lost = [], 0.0, 0.0, None
    stream = socket.create_connection(address, timeout=30)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    echo(stream)
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        if silent:
            time.sleep(0.05)
            continue
        waited = waited_for_processor(schedules)
        started = time.perf_counter()
        try:
            echo(stream)
        except OSError as error:
            lost = str(error)
            break
        now = time.perf_counter()
        echoes.append(now - started)
        unexplained = max(unexplained, now - started - (waited_for_processor(schedules) - waited))
        time.sleep(PAUSE)
        oversleep = max(oversleep, time.perf_counter() - now - PAUSE)
    print(json.dumps(summary(echoes, oversleep, unexplained, lost)))


def waited_for_processor(schedules):
    """Seconds so far; 0 where the kernel does not count them."""
    try:
        return sum(int(schedule.read_text().split()[1]) for schedule in schedules) / 1e9
    except (OSError, IndexError):
        return 0.0


def echo(stream):
    stream.sendall(MESSAGE)
    missing = len(MESSAGE)
    while missing:
        received = len(stream.recv(missing))
        if not received:
            raise ConnectionError("the server closed the connection")
        missing -= received


def summary(echoes, oversleep, unexplained, lost):
    echoes.sort()
    at = lambda share: round(echoes[int(share * (len(echoes) - 1))] * 1000, 2) if echoes else None
    return {
        "echoes": len(echoes),
        "p50_ms": at(0.5),
        "p99_ms": at(0.99),
        "max_ms": at(1),
        "max_ms_without_waits_for_a_processor": round(unexplained * 1000, 2),
        "oversleep_max_ms": round(oversleep * 1000, 2),
        "lost": lost,
    }


if __name__ == "__main__":
    main()
