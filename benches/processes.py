"""Runs commands under limits, and writes files completely or not at all: what `first_run.py` needs, without anything of Vitrum.

A command is its own process group, so that a limit, a signal or its own end also ends everything that it has started. It is not its
own session, so that ending this program's session ends its commands too. SIGTERM, SIGINT and SIGHUP are noted: the current command is
ended, and the results so far are still written.
"""
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple, Optional

# A command that prints more is ended: its output is read into memory, and its log may have to be carried home.
MOST_BYTES = 8 << 20
# This much of the beginning and of the end of stdout goes into the log.
LOGGED_BYTES = 32 << 10
# Seconds between SIGTERM and SIGKILL.
GRACE = 2.0


class Wrong(Exception):
    """An output that is not as expected. `rows`: what could be read of it."""

    def __init__(self, why, rows=()):
        super().__init__(why)
        self.rows = list(rows)


class Ended(NamedTuple):
    """How a command ended."""

    code: Optional[int]  # as Python has it: negative for a signal; `None`: it could not be started
    output: str
    why: Optional[str]  # what was wrong; `None`: it ended by itself, with 0
    out_of_time: bool  # ended because the time of all commands was up
    seconds: float


class Commands:
    """Runs one command after another, until their total time is used up or a signal arrives.

    `logs` gets a file per name that commands run under: their command lines, all of stderr, and the beginning and the end of stdout.
    """

    def __init__(self, logs, seconds, folder, env):
        self.logs, self.folder, self.env = logs, folder, env
        self.begin = time.monotonic()
        self.end = self.begin + seconds
        self.signal = None

    def note_signals(self):
        def note(number, _frame):
            self.signal = self.signal or signal.Signals(number).name

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, note)

    def elapsed(self):
        return time.monotonic() - self.begin

    def left(self):
        return max(0.0, self.end - time.monotonic())

    def run(self, name, words, limit, env=None):
        begin = time.monotonic()
        with self.log(name) as log, tempfile.TemporaryFile() as out:
            log.write(f"$ {shlex.join(words)}\n".encode())
            log.flush()
            at = size(log)
            try:
                child = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=out, stderr=log, cwd=self.folder, env=env or self.env, preexec_fn=os.setpgrp
                )
            except OSError as e:
                why = f"cannot be started: {e.strerror}"
                log.write(f"({why})\n".encode())
                return Ended(None, "", why, False, 0.0)
            why = None
            while why is None and not has_ended(child):
                time.sleep(0.02)
                why = self.reason_to_end(begin + limit, limit, size(out) + size(log) - at)
            out_of_time = why is not None and self.signal is None and self.left() == 0.0
            if not end_group(child):
                why = f"{why or 'done'}, and it cannot be killed"
            seconds = time.monotonic() - begin
            output, said = read(out, 0), read(log, at)
            why = why or unlike_success(child.returncode, said)
            log.write(shortened(output) + f"({why or 'done'}, {seconds:.1f} s)\n\n".encode())
        return Ended(child.returncode, output.decode(errors="replace"), why, out_of_time, seconds)

    def log(self, name):
        try:
            return open(os.path.join(self.logs, f"{name}.log"), "a+b")
        except OSError as e:
            # The results are worth more than the log.
            say(f"warning: no log of {name}: {e.strerror}")
            return tempfile.TemporaryFile("a+b")

    def reason_to_end(self, until, limit, printed):
        if self.signal:
            return f"interrupted by {self.signal}"
        if printed > MOST_BYTES:
            return f"ended, because it printed more than {MOST_BYTES >> 20} MiB"
        if self.left() == 0.0:
            return "ended, because the time of the whole run was up"
        if time.monotonic() > until:
            return f"ended after {limit:.0f} s, its limit"
        return None


def has_ended(child):
    """Does not reap it, so that its group cannot be reused."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end_group(child):
    """Ends the child, if it runs, and everything that it left running. Returns whether that succeeded."""
    if not has_ended(child):
        os.killpg(child.pid, signal.SIGTERM)
        until = time.monotonic() + GRACE
        while not has_ended(child) and time.monotonic() < until:
            time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        return False
    return True


def unlike_success(code, said):
    if code == 0:
        return None
    how = f"exit code {code}" if code > 0 else f"ended by {signal_name(-code)}"
    lines = [line.strip()[:300] for line in said[-4096:].decode(errors="replace").splitlines() if line.strip()]
    return ": ".join([how, *lines[-2:]])


def signal_name(number):
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def size(file):
    return os.fstat(file.fileno()).st_size


def read(file, at):
    file.seek(at)
    return file.read(MOST_BYTES)


def shortened(output):
    left_out = len(output) - 2 * LOGGED_BYTES
    if left_out <= 0:
        return output
    return output[:LOGGED_BYTES] + f"\n({left_out} bytes left out)\n".encode() + output[-LOGGED_BYTES:] + b"\n"


# ---- What commands print ----


def one_object(output):
    """The JSON object that a command prints."""
    try:
        value = json.loads(output)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Wrong(f"printed no JSON object but {output.strip()[:60]!r}" if output.strip() else "printed nothing")
    return value


def objects(output):
    """The JSON objects of a command that prints one per line as it goes; other lines are ignored."""
    found = []
    for line in output.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    if not found:
        raise Wrong("printed no JSON object" if output.strip() else "printed nothing")
    return found


def say(text):
    """For people who watch. A closed terminal stops nothing."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def write_whole(path, text):
    """Replaces a file atomically: readers find the old one or the new one."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
