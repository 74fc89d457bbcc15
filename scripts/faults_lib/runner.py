"""Plays rows one after the other, and writes down what came of each."""

import datetime
import json
import os
import platform
import signal
import time
import traceback

ROW_SECONDS_MAX = 240
STALL_MS_MAX = 100


class Skipped(Exception):
    """This machine can't show it; why is the message."""


class Run:
    """What is found out while a row is played."""

    def __init__(self, row):
        self.row = row
        self.figures, self.checks, self.command, self.ended = {}, [], None, None

    def figure(self, **figures):
        self.figures.update(figures)

    def check(self, what, holds):
        self.checks.append({"what": what, "holds": bool(holds)})

    def ends(self, server, stall_ms_max=STALL_MS_MAX):
        """Ends the server, which must leave nothing behind; the bystander must not have noticed anything."""
        self.command = server.command
        log = server.log
        self.ended = ended = server.end()
        record = ended.record
        self.figure(log=[line.split("] ", 1)[-1] for line in log().splitlines() if " WARN " in line][:20])
        self.check("exit code 0 and a record", ended.code == 0 and record is not None)
        if record:
            self.check("no slot leaked: accepted = closed", record["accepted"] == record["closed"] and record["open"] == 0)
            self.check("each refusal has a reason", record["refused"] == sum(record["refused_by"].values()))
        seen = ended.bystander
        if seen:
            self.check("the bystander was served to the end", seen["lost"] is None and seen["echoes"] > 0)
            if stall_ms_max is not None and seen["max_ms"] is not None:
                # The kernel's own work for an echo is late as well when the machine is: once on each way.
                most = stall_ms_max + 2 * seen["oversleep_max_ms"]
                self.check(
                    f"the bystander never waited {stall_ms_max} ms longer than the machine made it",
                    seen["max_ms_without_waits_for_a_processor"] <= most)
        return record or {}

    def to_json(self, state, seconds):
        return {
            "row": self.row.name,
            "fault": self.row.fault,
            "must_hold": self.row.must_hold,
            "state": state,
            "reproduce": f"scripts/faults {self.row.name}",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": f"{os.cpu_count()} cpus, Linux {platform.release()}",
            "load_average": os.getloadavg()[0],
            "seconds": round(seconds, 1),
            "figures": self.figures,
            "checks": self.checks,
            "bystander": self.ended and self.ended.bystander,
            "server_arguments": self.command and [a for a in self.command[1:] if "/" not in a],
            "server": self.ended and without_paths(self.ended.record),
        }


def without_paths(record):
    return record and {key: value for key, value in record.items() if key != "argv"}


def run(rows, out):
    """Whether all of them hold."""
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGALRM, give_up)
    states = [play(row, out) for row in rows]
    write_table(out)
    count = {state: states.count(state) for state in ("holds", "FAILS", "skipped")}
    print(f"{count['holds']} hold, {count['FAILS']} fail, {count['skipped']} skipped: records in {out}")
    return not count["FAILS"]


def write_table(out):
    """All records of the folder, as docs/reliability.md shows them."""
    lines = ["| fault | what must hold | measured | record |", "| --- | --- | --- | --- |"]
    for file in sorted(out.glob("*.json")):
        record = json.loads(file.read_text())
        measured = f"**{record['state']}**: {short(record['figures'], record['bystander'])}"
        lines.append(f"| {record['fault']} | {record['must_hold']} | {measured} | [{record['row']}]({file.name}) |")
    (out / "README.md").write_text("\n".join(lines) + "\n")


def give_up(*_):
    raise TimeoutError(f"the row took longer than {ROW_SECONDS_MAX} s")


def play(row, out):
    run, started = Run(row), time.monotonic()
    signal.alarm(ROW_SECONDS_MAX)
    try:
        row.play(run)
        state = "holds" if run.checks and all(check["holds"] for check in run.checks) else "FAILS"
    except Skipped as why:
        run.figure(skipped=str(why))
        state = "skipped"
    except Exception as error:
        run.figure(error=f"{type(error).__name__}: {error}", at=traceback.format_exc().splitlines()[-4:-1])
        state = "FAILS"
    finally:
        signal.alarm(0)
    record = run.to_json(state, time.monotonic() - started)
    (out / f"{row.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{state:8} {row.name:18} {record['seconds']:6} s  {line(run)}", flush=True)
    for check in run.checks:
        if not check["holds"]:
            print(f"         does not hold: {check['what']}", flush=True)
    return state


def line(run):
    return short(run.figures, run.ended and run.ended.bystander)


def short(figures, seen):
    """The figures that fit into a line."""
    simple = {key: value for key, value in figures.items() if not isinstance(value, (list, dict))}
    told = ", ".join(f"{key} {value}" for key, value in simple.items())
    waits = f"; bystander max {seen['max_ms']} ms ({seen['max_ms_without_waits_for_a_processor']} ms without waits for a processor; machine {seen['oversleep_max_ms']} ms late)" if seen else ""
    return told + waits
