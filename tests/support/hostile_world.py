"""What hostile programs are let loose on, and what must be as it was afterwards. Needs no pytest."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from soka_serve.evaluation.sandbox import Program, Verdict, run_programs, runner
from soka_serve.io import child_signals
from tests.support.hostile_effects import Attack

USER = 65534
"""The user that root's programs run as: other processes of this user are what a program may try to reach."""

CLAIM = "it got what it was after, by its own account"

_RIGHT = Program("def f():\n    return 7\n", ("assert f() == 7",))
_FS_IOC_GETFLAGS = 0x80086601


class World:
    """A folder, a process and a socket outside the sandbox, within reach of the user that programs run as."""

    def __init__(self, folder: Path, identity: int) -> None:
        self.out = folder
        folder.chmod(0o777)
        self.secret = folder / "secret"
        self.secret.write_text("the secret")
        self.secret.chmod(0o666)
        with contextlib.suppress(OSError):  # where the file system has none
            os.setxattr(self.secret, "user.secret", b"the secret")
        user: dict[str, int | list[int]] = {}
        if os.geteuid() == 0:
            os.chown(self.secret, identity, identity)
            user = {"user": identity, "group": identity, "extra_groups": []}
        self.process = subprocess.Popen(["/bin/sleep", "300"], cwd="/", start_new_session=True, **user)  # type: ignore[call-overload]
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen()
        self.socket.settimeout(0)
        self.before = self._seen()

    def source(self, attack: Attack) -> str:
        """The program of an attack on this world."""
        return attack.source(str(self.out), self.process.pid, self.socket.getsockname()[1])

    def _seen(self) -> dict[str, object]:
        seen: dict[str, object] = {"folder": sorted(file.name for file in self.out.iterdir())}
        with contextlib.suppress(OSError):
            found = self.secret.stat()
            seen |= {"text": self.secret.read_text(), "stat": (found.st_mode, found.st_nlink, found.st_ino)}
            seen |= {"times": (found.st_mtime_ns, found.st_ctime_ns), "xattr": sorted(os.listxattr(self.secret))}
            flags = bytearray(8)
            with self.secret.open() as file, contextlib.suppress(OSError):
                fcntl.ioctl(file, _FS_IOC_GETFLAGS, flags)
                seen["flags"] = struct.unpack("l", flags)[0]
        if self.process.poll() is not None:
            return seen | {"process": f"ended by {self.process.returncode}"}
        pid = self.process.pid
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        limits = Path(f"/proc/{pid}/limits").read_text()
        cores, policy = os.sched_getaffinity(pid), os.sched_getscheduler(pid)
        seen["process"] = (fields[0] in "TZ", os.getpriority(0, pid), limits, cores, policy)
        return seen

    def harm(self) -> list[str]:
        """What is not as it was."""
        now = self._seen()
        changed = [f"{what}: {now.get(what)}" for what in self.before if now.get(what) != self.before[what]]
        with contextlib.suppress(BlockingIOError):
            self.socket.accept()[0].close()
            changed.append("a connection was made")
        return changed

    def close(self) -> None:
        """End the process and the socket."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.socket.close()


@contextlib.contextmanager
def world(identity: int = USER) -> Iterator[World]:
    """A world in `/tmp`, removed afterwards; of another user than root's if root makes it."""
    with tempfile.TemporaryDirectory(prefix="soka-outside-", dir="/tmp") as folder:
        made = World(Path(folder), identity)
        try:
            yield made
        finally:
            made.close()


@contextlib.contextmanager
def older_kernel(abi: int | None) -> Iterator[None]:
    """Programs run as on a kernel whose Landlock is of that version; None: as on this one."""
    if abi is None:
        yield
        return
    own = runner.__file__
    with tempfile.TemporaryDirectory() as place:
        folder, beside = Path(place, "evaluation", "sandbox"), Path(place, "io")
        for made in (folder, beside):
            made.mkdir(parents=True)
        for made in (Path(place), folder.parent, folder, beside):
            made.chmod(0o755)
        shutil.copy(child_signals.__file__, beside)
        for file in Path(own).parent.glob("*.py"):
            text = file.read_text()
            if file.name == "confine.py":
                text += f"\n_newest = landlock_version\n\n\ndef landlock_version():\n    return min(_newest(), {abi})\n"
            (folder / file.name).write_text(text)
        runner.__file__ = str(folder / "runner.py")
        try:
            yield
        finally:
            runner.__file__ = own


@contextlib.contextmanager
def use_of(folder: str | None) -> Iterator[list[int]]:
    """The most bytes of a folder's file system that were taken meanwhile, as the only item of a list."""
    most = [0]
    if folder is None:
        yield most
        return
    ended = threading.Event()

    def taken() -> int:
        there = os.statvfs(folder)
        return (there.f_blocks - there.f_bfree) * there.f_frsize

    before = taken()

    def watch() -> None:
        while not ended.wait(0.002):
            most[0] = max(most[0], taken() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def harms(attack: Attack, *, scratch: str | None = None, timeout_s: float = 8, most_disk: int = 128 << 20) -> list[str]:
    """Run an attack, and after it a right program in the same sandbox; what should not have happened.

    Args:
        attack: the program.
        scratch: a folder whose file system only the attack uses; None: its use is not watched.
        timeout_s: for each program.
        most_disk: bytes that may be taken for as long as it takes to see them.
    """
    started = time.monotonic()
    with world() as there, use_of(scratch) as most, older_kernel(attack.abi):
        programs = [Program(there.source(attack), ("assert f()",)), _RIGHT]
        verdicts = run_programs(programs, allow_code_execution=True, timeout_s=timeout_s, workers=1)
        found = there.harm()
    took = time.monotonic() - started
    if verdicts[0].passed:
        found.append(CLAIM)
    if verdicts[1] != Verdict(True):
        found.append(f"the next program was judged {verdicts[1]}")
    if most[0] > most_disk:
        found.append(f"{most[0] >> 20} MiB of disk were taken")
    if took > timeout_s + 4:
        found.append(f"it took {took:.1f} s")
    return found


def main() -> None:
    """Run attacks by the user who starts this; print the name and the harms of each as a line of JSON."""
    from tests.support.hostile_effects import ATTACKS

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--scratch", help="a folder on a file system of its own: those that fill disks, alone")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("N", "OF"), help="every OF-th from N on")
    arguments = parser.parse_args()
    scratch, (part, parts) = arguments.scratch, arguments.part
    tempfile.tempdir = scratch
    for index, (name, attack) in enumerate(ATTACKS.items()):
        if attack.scratch == (scratch is not None) and index % parts == part:
            print(json.dumps([name, harms(attack, scratch=scratch)]), flush=True)


if __name__ == "__main__":
    main()
