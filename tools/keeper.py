"""Runs one command and ends its whole process group when the run ends, however it ends.

    python keeper.py [--grace=SECONDS] [--remove=FOLDER] [--pipes=IN,OUT] COMMAND...

Standard input is a pipe that the run holds: it closes with the run, `kill -9` included. The command's children end too
when only the command itself was killed, and the folder is removed then. Descriptors IN and OUT become the command's
3 and 4. Servers and browsers are started through it. Nothing but the standard library, so that it starts in no time and
cannot fail for want of anything.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

COMMAND = (sys.executable, "-I", "-S", __file__)
"""What to start it with: without this folder on the module path, whose `types.py` is not Python's."""
GRACE_S = 10.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> int:
    """Returns the command's exit code as a shell would give it."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # children of the command that change their group become ours when it dies
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal's Ctrl-C is for the run to decide on
    command = sys.argv[1:]
    options = dict.fromkeys(("--grace", "--remove", "--pipes"), "")
    while command[0].startswith("--"):
        name, _, options[name] = command.pop(0).partition("=")
    grace_s = float(options["--grace"] or GRACE_S)
    pipes = _as_3_and_4(options["--pipes"])
    process = subprocess.Popen(  # noqa: S603 - the command is the run's own
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_in_the_command,
        pass_fds=pipes,
    )
    for pipe in pipes:  # so that their other ends hear of the command's end
        os.close(pipe)
    while process.poll() is None:
        ready, _, _ = select.select([0], [], [], 0.2)
        if ready and not os.read(0, 4096):
            break
    end(process, grace_s)
    if options["--remove"]:
        shutil.rmtree(options["--remove"], ignore_errors=True)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _as_3_and_4(pipes: str) -> tuple[int, ...]:
    if not pipes:
        return ()
    moved = []
    for pipe in pipes.split(","):
        moved.append(fcntl.fcntl(int(pipe), fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(int(pipe))
    for number, high in enumerate(moved, start=3):
        os.dup2(high, number)
        os.close(high)
    return (3, 4)


def _in_the_command() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # if we are killed, nobody else would end it


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """TERM to the command and all that it started, KILL to what is left of them after `grace_s`."""
    deadline = time.monotonic() + (grace_s if process.poll() is None else min(grace_s, 1.0))
    _signal(process.pid, signal.SIGTERM)
    asked = {process.pid}
    while time.monotonic() < deadline:
        process.poll()
        _reap(process.pid)
        for pid in set(_descendants()) - asked:  # of another group, so that the first signal did not reach them
            _kill(pid, signal.SIGTERM)
            asked.add(pid)
        if not _descendants() and not _group_lives(process.pid):
            break
        time.sleep(0.05)
    _signal(process.pid, signal.SIGKILL)
    while _descendants():
        for pid in _descendants():
            _kill(pid, signal.SIGKILL)
        process.poll()
        _reap(process.pid)
        time.sleep(0.02)
    process.wait()


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _descendants() -> list[int]:
    """Our children by now, orphans that we inherited included; empty where /proc does not say."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def _reap(command: int) -> None:
    """Collect the dead among the inherited; the command itself is left to its `Popen`."""
    for pid in _descendants():
        if pid != command:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


if __name__ == "__main__":
    sys.exit(main())
