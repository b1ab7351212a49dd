"""The sandbox against bubblewrap: what each contains of `tests/support/hostile_effects.py`, and what a start costs.

    apt-get install bubblewrap util-linux e2fsprogs
    python -m eval.bench.sandbox --out eval/results/sandbox.json  # as root

Every program is run by one ordinary user with the same limits (memory, CPU time, file size, open files), in

- `limits`: nothing but those, which shows that the attack works;
- `bubblewrap`: its namespaces, Python's folders read-only, a scratch folder of 16 MiB in memory;
- `bubblewrap and filter`: the same with this sandbox's list of refused system calls (`--seccomp`);
- `ours`: `soka_serve.evaluation.sandbox`, which also runs the tests and a second program after it.

- `ours in bubblewrap`: both, one within the other.

An attack is contained if nothing outside is changed, no process of the user's harmed, no connection made, no more of
the disk taken than for an instant, and no memory beyond the limits. `(yes)`: contained, but the program could do in
there what this sandbox refuses (make processes, io_uring, namespaces). Disks are watched on an ext4 file system of
their own. `start` is the median wall time of a program that does nothing: a start of its own, and for `ours` also one
of fifty in a row (what a benchmark of many programs sees).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]

from eval.record import make_parser, write_record  # noqa: E402
from soka_serve.evaluation.sandbox import confine  # noqa: E402
from tests.support.hostile_effects import ATTACKS, Attack  # noqa: E402
from tests.support.hostile_world import CLAIM, use_of, world  # noqa: E402
from tests.support.sandboxed import USER, identity, mounted_disk, outside  # noqa: E402

IDENTITY = identity()
PYTHON = "/usr/bin/python3"
_NAME = re.compile(r"/\S*soka-outside-\w+")  # of the folder outside, another in each run
BARE = (PYTHON, "-s", "-S", "-P", "-B", "-X", "utf8", "-c")
TIMEOUT_S = 20
CPU_S = 8

# The program's side alone: what it says it got is the last thing that it prints.
PROGRAM = """
import sys
names = {"__name__": "__candidate__"}
exec(compile(sys.stdin.read(), "<program>", "exec"), names)
print("\\nGOT", bool(names["f"]()), flush=True)
"""
LIMITS = (
    *("prlimit", f"--as={confine.MAX_MEMORY_BYTES}", f"--cpu={CPU_S}", f"--fsize={confine.MAX_FILE_BYTES}"),
    *(f"--nofile={confine.MAX_OPEN_FILES}", "--core=0", "--memlock=0", "--msgqueue=0"),
)
BUBBLEWRAP = (
    *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"),
    *("--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"),
    *("--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"),
    *("--size", str(16 << 20), "--tmpfs", "/scratch", "--chdir", "/scratch"),
)
# The whole sandbox in a jail: the verdict is the program's word.
WITHIN = """
import sys, tempfile
from soka_serve.evaluation.sandbox import Program, run_programs
from tests.support.hostile_world import older_kernel
tempfile.tempdir = "/scratch"
with older_kernel(int(sys.argv[1]) or None):
    programs = [Program(sys.stdin.read(), ("assert f()",)), Program("def f():\\n    return 1", ("assert f() == 1",))]
    verdicts = run_programs(programs, allow_code_execution=True, timeout_s=8, workers=1)
assert verdicts[1].passed, verdicts
print("\\nGOT", verdicts[0].passed, verdicts[0].reason)
"""
# In a namespace in which all users are, and in which there can be no other.
FORBIDDING = """
import ctypes, os, sys
assert ctypes.CDLL(None).unshare(0x10000000) == 0
print("apart", flush=True)
sys.stdin.readline()
open("/proc/sys/user/max_user_namespaces", "w").write("0")
user = int(sys.argv[1])
os.setgroups([])
os.setgid(user)
os.setuid(user)
os.execvp(sys.argv[2], sys.argv[2:])
"""
RUN = """
import json, statistics, sys, time
from soka_serve.evaluation.sandbox import Program, run_programs
program = Program("def f():\\n    return 1", ("assert f() == 1",))
def run(count):
    started = time.perf_counter()
    verdicts = run_programs([program] * count, allow_code_execution=True, workers=1)
    assert all(v.passed for v in verdicts), verdicts
    return (time.perf_counter() - started) / count
print(json.dumps([run(int(sys.argv[1])) for _ in range(int(sys.argv[2]))]))
"""


def as_user(command: Sequence[str], **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command as the ordinary user."""
    return outside(command, env={"PATH": "/usr/bin:/bin"}, timeout=None, **IDENTITY, **more)


def killed_in_time(command: Sequence[str], text: str, **more: Any) -> str:
    """What a command of the user's prints; it and its children are ended after `TIMEOUT_S`."""
    more |= {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {"PATH": "/usr/bin:/bin"}
    process: subprocess.Popen[str] = subprocess.Popen(
        command, env=environment, start_new_session=True, **IDENTITY, **more
    )
    try:
        return str(process.communicate(text, timeout=TIMEOUT_S)[0])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return str(process.communicate()[0]) + "\ntimeout"


def seccomp_filter() -> bytes:
    """The sandbox's list of refused calls, without those by which bubblewrap starts the program."""
    kept = {name: numbers for name, numbers in confine._REFUSED.items() if name not in ("execve", "execveat")}
    with mock.patch.object(confine, "_REFUSED", kept):
        code = confine._program(platform.machine())
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


@contextlib.contextmanager
def own_disk() -> Iterator[str]:
    """A folder of the user's on an ext4 file system of 512 MiB."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        place = Path(folder, "disk")
        place.mkdir()
        with mounted_disk(Path(folder, "image"), place) as mounted:
            if not mounted:
                sys.exit("no disk can be mounted here")
            os.chown(place, USER, USER)
            yield str(place)


@dataclass(frozen=True)
class Launcher:
    """How a program is run: what stands before the program's own command, and that command."""

    prefix: tuple[str, ...] = ()
    command: tuple[str, ...] = (*BARE, PROGRAM)
    filtered: bool = False


WAYS = {
    "limits": Launcher(LIMITS),
    "bubblewrap": Launcher((*LIMITS, *BUBBLEWRAP)),
    "bubblewrap and filter": Launcher((*LIMITS, *BUBBLEWRAP), filtered=True),
    "ours in bubblewrap": Launcher(
        (*BUBBLEWRAP, "--proc", "/proc", "--ro-bind", str(ROOT), str(ROOT), "--setenv", "PYTHONPATH", str(ROOT)),
        (PYTHON, "-B", "-c", WITHIN),
    ),
}


def jailed(way: Launcher, attack: Attack, disk: str) -> dict[str, Any]:
    """Run one attack; what it did."""
    with world(USER) as there, use_of(disk) as most, tempfile.TemporaryFile() as rules:
        prefix, descriptors = way.prefix, []
        if way.filtered:
            rules.write(seccomp_filter())
            rules.seek(0)
            descriptors = [rules.fileno()]
            prefix = (*prefix, "--seccomp", str(rules.fileno()))
        command = [*prefix, *way.command, str(attack.abi or 0)]
        # A parent of its own: some attacks are on that.
        script = ["/bin/sh", "-c", '"$@"; exit', "sh", *command]
        started = time.monotonic()
        output = killed_in_time(script, there.source(attack), cwd=disk, pass_fds=descriptors)
        found = there.harm()
    if most[0] > 128 << 20:
        found.append(f"{most[0] >> 20} MiB of disk were taken")
    shutil.rmtree(disk, ignore_errors=True)
    last = output.strip().splitlines()[-1:]
    seconds = round(time.monotonic() - started, 2)
    return judged(attack, found, "GOT True" in output) | {
        "ended": _NAME.sub("OUT", "".join(last))[:200],
        "seconds": seconds,
    }


def judged(attack: Attack, harm: list[str], claims: bool) -> dict[str, Any]:
    """Whether an attack was contained; what it says it got counts where that is not its own."""
    return {"contained": not harm and not (claims and attack.outside), "harm": harm, "claims": claims}


def ours(disk: str) -> dict[str, dict[str, Any]]:
    """All attacks in this sandbox, by the user."""
    lines: list[tuple[str, list[str]]] = []
    for options in ([], ["--scratch", disk]):
        done = as_user([PYTHON, "-m", "tests.support.hostile_world", *options])
        assert done.returncode == 0, done.stderr
        lines += [json.loads(line) for line in done.stdout.splitlines()]
    assert {name for name, _ in lines} == set(ATTACKS)
    return {name: judged(ATTACKS[name], [h for h in harm if h != CLAIM], CLAIM in harm) for name, harm in lines}


def starts(rounds: int) -> dict[str, Any]:
    """Median seconds of a program that does nothing, the ways in turn."""
    ways: dict[str, Callable[[], float]] = {
        "python alone": lambda: wall([*BARE, "pass"]),
        "bubblewrap": lambda: wall([*LIMITS, *BUBBLEWRAP, *BARE, "pass"]),
        "ours, a start of its own": lambda: json.loads(as_user([PYTHON, "-c", RUN, "1", "1"]).stdout)[0],
    }
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, measure in ways.items():
            seen[name].append(measure())
    seen["ours, one of fifty in a row"] = json.loads(as_user([PYTHON, "-c", RUN, "50", "3"]).stdout)
    medians = {name: statistics.median(values) for name, values in seen.items()}
    base = medians["bubblewrap"]
    return {
        name: {"seconds": round(value, 4), "to_bubblewrap": round(value / base, 2), "of": len(seen[name])}
        for name, value in medians.items()
    }


def wall(command: Sequence[str]) -> float:
    """Seconds of one command."""
    started = time.perf_counter()
    done = as_user(command, input="")
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - started


def needs() -> dict[str, Any]:
    """Whether each starts as the user, and as the user where there are no user namespaces (as in most containers)."""
    probe = "import sys; from soka_serve.evaluation.sandbox import check_sandbox; check_sandbox()"
    ways = {"ours": [PYTHON, "-c", probe], "bubblewrap": [*BUBBLEWRAP, *BARE, "pass"]}
    found = {}
    for name, command in ways.items():
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        without = subprocess.Popen(
            [PYTHON, "-c", FORBIDDING, str(USER), *command],
            env=environment, cwd="/", text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert without.stdout is not None
        assert without.stdout.readline() == "apart\n"
        for kind in ("uid", "gid"):
            Path(f"/proc/{without.pid}/{kind}_map").write_text("0 0 70000")
        output = without.communicate("\n")[0]
        found[name] = {
            "by a user": as_user(command).returncode == 0,
            "without user namespaces": without.returncode == 0,
            "says": output.strip()[-200:],
        }
    return found


def lines_of_ours() -> dict[str, int]:
    """Lines of the sandbox's files that are neither empty nor comments."""
    count = {}
    for file in sorted((ROOT / "soka_serve" / "evaluation" / "sandbox").glob("*.py")):
        lines = (line.strip() for line in file.read_text().splitlines())
        count[file.name] = sum(1 for line in lines if line and not line.startswith("#"))
    return count


def word(result: dict[str, Any]) -> str:
    """A cell of the table."""
    return "NO" if not result["contained"] else "(yes)" if result["claims"] else "yes"


def table(attacks: dict[str, dict[str, Any]]) -> str:
    """What each way contains, for a reader."""
    ways = list(next(iter(attacks.values())))
    rows = [["attack", *ways], *([name, *(word(of[w]) for w in ways)] for name, of in attacks.items())]
    rows.append(["contained", *(f"{sum(of[w]['contained'] for of in attacks.values())}/{len(attacks)}" for w in ways)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = make_parser("eval.bench.sandbox", __doc__)
    parser.add_argument("--rounds", type=int, default=50, help="starts of each way")
    arguments = parser.parse_args()
    if os.geteuid() != 0 or platform.machine() != "x86_64":
        sys.exit("needs root, to mount a disk and to become another user, on x86-64")
    for command in ("bwrap", "prlimit", "mkfs.ext4", "unshare", "setpriv"):
        if shutil.which(command) is None:
            sys.exit(f"needs {command}: apt-get install bubblewrap util-linux e2fsprogs")
    with own_disk() as disk:
        attacks: dict[str, dict[str, Any]] = {}
        for name, attack in ATTACKS.items():
            attacks[name] = {way: jailed(how, attack, disk) for way, how in WAYS.items()}
        for name, of in ours(disk).items():
            attacks[name]["ours"] = of
    print(table(attacks))
    result = {
        "kernel": platform.release(),
        "landlock": confine.landlock_version(),
        "needs": needs(),
        "start": starts(arguments.rounds),
        "lines": lines_of_ours(),
        "attacks": attacks,
    }
    print(json.dumps({key: result[key] for key in ("needs", "start", "lines")}, indent=2))
    write_record(arguments, result, packages={"bubblewrap": as_user(["bwrap", "--version"]).stdout.split()[-1]})


if __name__ == "__main__":
    main()
