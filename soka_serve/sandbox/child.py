"""The sandbox's own process: `python child.py`, started by `soka_serve.sandbox`. Standard library only.

It reads a program, forks one process that runs it and, after that, reads the tests and forks another that runs those.
Both lock themselves in first. The tests call the program's functions over a pipe, on which only plain data has a
value: the program never sees the tests, the asserts, or the nonce that proves they all ran, and shares no objects with
them. This process runs neither; it measures time and disk, ends both, and reports.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib.util
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from soka_serve.sandbox import lock, wire
else:

    def _beside(name):
        # By path: the interpreter is bare, and a program shall not be able to import these.
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    lock = _beside("lock")
    wire = _beside("wire")

TICK_S = 0.02
MAX_SCRATCH_BYTES = 16 << 20
MAX_SCRATCH_FILES = 256
MAX_ITEMS = 100_000

# Imported once here and inherited, rather than by every program anew.
_USUAL = (
    *("array", "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq"),
    *("itertools", "json", "math", "operator", "random", "re", "statistics", "string", "textwrap", "typing"),
)


def main() -> None:
    """Serve jobs until the other side closes."""
    weak = "--weak" in sys.argv
    os.environ.clear()
    for name in _USUAL:
        importlib.import_module(name)
    lock.prepare()
    while (job := wire.read_frame(0)) is not None:
        wire.write_frame(1, _run(job, weak))


def _run(job: Mapping[str, Any], weak: bool) -> dict[str, Any]:
    deadline = time.monotonic() + job["timeout_s"]
    requests_out, requests_in = os.pipe()
    replies_out, replies_in = os.pipe()
    confine = _confiner(job, weak)
    program = _fork(lambda: _run_program(job["code"], confine, requests_out, replies_in))
    os.close(requests_out)
    os.close(replies_in)
    # Only now: the program's process was made before the tests and the nonce came in.
    tests = wire.read_frame(0)
    result_out, result_in = os.pipe()
    checker = _fork(lambda: _run_tests(tests or {}, confine, requests_in, replies_out, result_in))
    for fd in (requests_in, replies_out, result_in):
        os.close(fd)
    try:
        stopped = _wait(result_out, deadline, Path(job["scratch"]))
    finally:
        for process in (program, checker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(program, 0)
        os.waitpid(checker, 0)
    result = None
    if stopped is None:
        with contextlib.suppress(wire.WireError):
            result = wire.read_frame(result_out)
    os.close(result_out)
    if result is None:
        return {"passed": False, "reason": stopped or "the tests ended before they had all run"}
    if result.get("closed"):
        result["reason"] = f"the program ended by itself ({_how(status)})"
    return result


def _fork(run: Callable[[], None]) -> int:
    process = os.fork()
    if process:
        return process
    try:
        run()
    finally:
        os._exit(0)


def _how(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return f"exit status {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    return f"signal {number}" + (", as when CPU time runs out" if number == signal.SIGKILL else "")


def _wait(fd: int, deadline: float, scratch: Path) -> str | None:
    """Wait for the result; the reason why there is none."""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return "timeout"
        ready = select.select([fd, 0], [], [], min(TICK_S, left))[0]
        if fd in ready:
            return None
        if ready:
            return "the caller is gone"  # it sends no other job before it has the answer
        if _too_full(scratch):
            return f"more than {MAX_SCRATCH_FILES} files or {MAX_SCRATCH_BYTES} bytes written"


def _too_full(scratch: Path) -> bool:
    total = count = 0
    try:
        with os.scandir(scratch) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
                count += 1
                if count > MAX_SCRATCH_FILES or total > MAX_SCRATCH_BYTES:
                    return True
    except OSError:
        return True
    return False


def _confiner(job: Mapping[str, Any], weak: bool) -> Callable[[Sequence[int]], None]:
    """What both processes do first: keep these descriptors and no other, then lock."""

    def confine(keep: Sequence[int]) -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        low = 3
        for fd in sorted(keep):
            os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, 1 << 16)
        lock.lock(job["scratch"], job["cpu_s"], weak=weak)

    return confine


# -------------------------------------------------------------------------------------- the program's own process


def _run_program(code: str, confine: Callable[[Sequence[int]], None], requests: int, replies: int) -> None:
    try:
        confine((requests, replies))
    except lock.MissingProtectionError as error:
        wire.write_frame(replies, {"refused": str(error)})
        return
    objects: list[Any] = []

    def handle(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    names: dict[str, Any] = {"__name__": "__candidate__"}
    try:
        exec(compile(code, "<program>", "exec", dont_inherit=True), names)
        public = {name: value for name, value in names.items() if not name.startswith("__")}
        wire.write_frame(replies, {"names": {n: wire.encode(v, handle) for n, v in public.items()}})
    except BaseException as error:  # noqa: BLE001 - whatever a program raises is its answer
        wire.write_frame(replies, {"error": _described(error)})
        return
    while (request := wire.read_frame(requests)) is not None:
        try:
            answer = {"value": wire.encode(_answer(request, objects), handle)}
        except BaseException as error:  # noqa: BLE001
            answer = {"error": _described(error)}
        wire.write_frame(replies, answer)


def _answer(request: Mapping[str, Any], objects: Sequence[Any]) -> Any:
    values = [wire.decode(value, objects.__getitem__) for value in request["values"]]
    target = objects[request["target"]]
    match request["op"]:
        case "call":
            count = request["positional"]
            named = dict(zip(request["keywords"], values[count:], strict=True))
            return target(*values[:count], **named)
        case "get":
            return getattr(target, request["name"])
        case "set":
            setattr(target, request["name"], values[0])
            return None
        case "item":
            return target[values[0]]
        case "truth":
            return bool(target)
        case "iterate":
            found = []
            for item in target:
                found.append(item)
                if len(found) > MAX_ITEMS:
                    raise OverflowError("too many items")
            return found
        case _:
            raise ValueError("unknown request")


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:  # noqa: BLE001
        return "an exception that cannot be shown"


# ---------------------------------------------------------------------------------------------------- the tests


class _ProgramError(Exception):
    """The program raised, or answered what is no value."""


class _ClosedError(Exception):
    """The program's process is gone."""


class _Channel:
    def __init__(self, requests: int, replies: int) -> None:
        self.requests = requests
        self.replies = replies

    def read(self) -> dict[str, Any]:
        try:
            reply = wire.read_frame(self.replies)
        except wire.WireError as error:
            raise _ProgramError(str(error)) from None
        if reply is None:
            raise _ClosedError
        if "error" in reply:
            raise _ProgramError(str(reply["error"])[:300])
        return reply

    def ask(self, op: str, target: int, values: Sequence[Any] = (), **more: Any) -> Any:
        encoded = [wire.encode(value, _refuse) for value in values]
        request = {"op": op, "target": target, "values": encoded, **more}
        try:
            wire.write_frame(self.requests, request)
        except BrokenPipeError:
            raise _ClosedError from None
        return self.value(self.read().get("value"))

    def value(self, data: Any) -> Any:
        try:
            return wire.decode(data, lambda number: _Remote(self, number))
        except wire.WireError as error:
            raise _ProgramError(str(error)) from None


def _refuse(value: Any) -> int:
    if isinstance(value, _Remote):
        return int(object.__getattribute__(value, "_number"))
    raise _ProgramError(f"a test hands over a {type(value).__name__}, which is not plain data")


class _Remote:
    """Something of the program's that is not plain data: it can be called and looked into, never compared."""

    __slots__ = ("_channel", "_number")

    def __init__(self, channel: _Channel, number: int) -> None:
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_number", number)

    def _ask(self, op: str, values: Sequence[Any] = (), **more: Any) -> Any:
        channel: _Channel = object.__getattribute__(self, "_channel")
        return channel.ask(op, object.__getattribute__(self, "_number"), values, **more)

    def __call__(self, *values: Any, **named: Any) -> Any:
        return self._ask("call", [*values, *named.values()], positional=len(values), keywords=list(named))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", name=name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", [value], name=name)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", [key])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ask("iterate"))

    def __bool__(self) -> bool:
        # Nothing is gained by an object here: the program may as well answer True or False.
        return self._ask("truth") is True

    def _no_value(self, *_: object) -> NoReturn:
        raise _ProgramError("the program's answer is not plain data")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _no_value
    __str__ = __repr__ = __hash__ = __contains__ = _no_value


def _run_tests(
    job: Mapping[str, Any], confine: Callable[[Sequence[int]], None], requests: int, replies: int, result: int
) -> None:
    def report(**fields: Any) -> None:
        wire.write_frame(result, {"passed": False, **fields})

    channel = _Channel(requests, replies)
    at = "before the tests"
    try:
        confine((requests, replies, result))
        first = channel.read()
        if "refused" in first:
            report(refused=str(first["refused"]))
            return
        scope = _scope(job, channel, first.get("names"))
        for index, source in enumerate([job["setup"], *job["tests"]]):
            at = f"in test {index}" if index else "in the setup of the tests"
            exec(compile(source, "<tests>", "exec", dont_inherit=True), scope)
    except lock.MissingProtectionError as error:
        report(refused=str(error))
    except _ClosedError:
        report(closed=True, reason="")
    except AssertionError:
        report(reason=f"assert failed {at}")
    except _ProgramError as error:
        report(reason=f"{error} ({at})")
    except BaseException as error:  # noqa: BLE001 - the tests run the dataset's code
        report(reason=f"{_described(error)} ({at})")
    else:
        report(passed=True, reason="", nonce=job["nonce"])


def _scope(job: Mapping[str, Any], channel: _Channel, names: Any) -> dict[str, Any]:
    """The tests' globals: the real builtins, and the names that they take from the program."""
    scope: dict[str, Any] = {"__name__": "__tests__", "__builtins__": builtins}
    if not isinstance(names, dict):
        raise _ProgramError("no names")
    used = _names_in([job["setup"], *job["tests"]])
    wanted = job["names"]
    for name, data in names.items():
        if name not in used or (name not in wanted if wanted else hasattr(builtins, name)):
            continue
        if isinstance(data, dict) and "m" in data:
            # A module that the program imported is imported anew: the program may have changed its own.
            if str(data["m"]).partition(".")[0] in sys.stdlib_module_names:
                scope[name] = _module(str(data["m"]))
        else:
            scope[name] = channel.value(data)
    return scope


def _module(name: str) -> ModuleType:
    return importlib.import_module(name)


def _names_in(sources: Sequence[str]) -> set[str]:
    nodes = (node for source in sources for node in ast.walk(ast.parse(source)))
    return {node.id for node in nodes if isinstance(node, ast.Name)}


if __name__ == "__main__":
    main()
