"""A connection that has nothing to do with the fault and echoes all along: python3 bystander.py HOST PORT.

Falls silent on SIGUSR1 and goes on after SIGUSR2. Ends when standard input does, and prints how long its echoes took. How much too long this process
itself slept is told beside it: so much of a delay is the machine's, not the server's.
"""

import json
import select
import signal
import socket
import sys
import time

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
    echoes, oversleep, lost = [], 0.0, None
    stream = socket.create_connection(address, timeout=30)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    echo(stream)
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        if silent:
            time.sleep(0.05)
            continue
        started = time.perf_counter()
        try:
            echo(stream)
        except OSError as error:
            lost = str(error)
            break
        now = time.perf_counter()
        echoes.append(now - started)
        time.sleep(PAUSE)
        oversleep = max(oversleep, time.perf_counter() - now - PAUSE)
    print(json.dumps(summary(echoes, oversleep, lost)))


def echo(stream):
    stream.sendall(MESSAGE)
    missing = len(MESSAGE)
    while missing:
        received = len(stream.recv(missing))
        if not received:
            raise ConnectionError("the server closed the connection")
        missing -= received


def summary(echoes, oversleep, lost):
    echoes.sort()
    at = lambda share: round(echoes[int(share * (len(echoes) - 1))] * 1000, 2) if echoes else None
    return {
        "echoes": len(echoes),
        "p50_ms": at(0.5),
        "p99_ms": at(0.99),
        "max_ms": at(1),
        "oversleep_max_ms": round(oversleep * 1000, 2),
        "lost": lost,
    }


if __name__ == "__main__":
    main()
