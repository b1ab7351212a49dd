"""Templates that loop or compute, rendered in a process of their own with limits on time, memory and text.

The parent (`render`) sends a template and the variables of many rows at once, pickled; the child (`main`) answers each
row with text or JSON, never with a pickle: it has run what others wrote.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

MAX_CPU_S = 1.0  # of one row, or of a batch; a batch that takes longer is tried again row by row
MEAN_CPU_S = 0.005  # of all rows; a long chat takes a tenth of it
MAX_MEMORY = 768 << 20  # bytes of address space
MAX_TEXT = 16 << 20  # characters rendered of one row
MEAN_TEXT = 4096  # of all rows, beside the template's length and so many times what goes in
_GROWTH = 8
_MAX_MESSAGE = 1000
_OVERSPENT = {"problem": "limit", "message": f"takes more than {MEAN_CPU_S * 1000:g} ms of processor time a row"}
_TOO_LONG = {
    "problem": "limit",
    "message": f"makes more than {MAX_TEXT:,} characters, or than {_GROWTH} times what goes in",
}
_TEXT, _PROBLEM = b"T", b"P"  # what an answer is: text, or JSON that says why there is none
_BATCH_ROWS, _BATCH_BYTES = 256, 4 << 20

# Started without the user's environment, and without site-packages but for where Jinja2 and this package are.
_BOOT = (
    "import json, sys; sys.path += json.loads(sys.argv[1]); from soka_serve.manifest.template_child import main; main()"
)
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")


@dataclass(frozen=True)
class RenderResult:
    """The result of rendering one row.

    `text` is None where the template failed; `problem` is then 'syntax' (with its `line`), 'undefined', 'null',
    'limit' or 'fails' (with the `error`'s class), and `message` says what happened.
    """

    text: str | None
    problem: str = ""
    message: str = ""
    line: int = 0
    error: str = ""


def render(kind: str, source: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[RenderResult]:
    """Render a template for each row, in order; with no rows, only compile it: one result, of no text.

    Args:
        kind: 'row' or 'chat', which environment.
        source: the template.
        rows: variables.

    Yields:
        A result for each row, up to the first that the child does not survive.
    """
    try:
        for count, batch in _batches(rows) if rows else [(1, pickle.dumps([]))]:
            child = _child()
            found = child.render(kind, source, batch, count)
            yield from found
            if len(found) == count:
                continue
            ended = child.why_ended()
            # Some answers were on their way when it ended: which row it was, each alone will show.
            for row in pickle.loads(batch)[len(found) :] if count > 1 else ():
                child = _child()
                result = child.render(kind, source, pickle.dumps([row]), 1)
                if not result:
                    ended = child.why_ended()
                    break
                yield from result
            else:
                if count > 1:
                    continue  # it was all of them together
            yield ended
            return
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        message = f"a value cannot be handed to the template's process: {error}"
        yield RenderResult(None, "fails", message, error=type(error).__name__)


def _batches(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, bytes]]:
    """How many rows, and those rows pickled."""
    start = 0
    count = _BATCH_ROWS
    while start < len(rows):
        batch = list(rows[start : start + count])
        data = pickle.dumps(batch, protocol=pickle.HIGHEST_PROTOCOL)
        if len(data) > _BATCH_BYTES and count > 1:
            count = max(1, count // 2)
            continue
        yield len(batch), data
        start += count


# ---------------------------------------------------------------------------------------------------------- the parent


class _Child:
    """A running child. It ends with its parent, whose end of the pipe is then closed."""

    def __init__(self) -> None:
        import jinja2
        import markupsafe

        roots = [str(Path(__file__).parents[2]), *(str(Path(str(m.__file__)).parents[1]) for m in (jinja2, markupsafe))]
        places = [*dict.fromkeys(roots), *(path for path in sys.path if path)]  # the rest: for types that rows hold
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BOOT, json.dumps(places)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT if name in os.environ},
        )
        self._lock = threading.Lock()
        self.pid = os.getpid()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def render(self, kind: str, source: str, batch: bytes, count: int) -> list[RenderResult]:
        """The results of a batch of `count` rows; fewer where the child did not survive."""
        found: list[RenderResult] = []
        with self._lock, suppress(OSError, EOFError):
            _write_frame(self._in, pickle.dumps((kind, source)))
            _write_frame(self._in, batch)
            self._in.flush()
            for _ in range(count):
                found.append(self._read())
        return found

    @property
    def _in(self) -> BinaryIO:
        assert self._process.stdin is not None
        return self._process.stdin  # type: ignore[return-value]

    def _read(self) -> RenderResult:
        assert self._process.stdout is not None
        head = self._process.stdout.read(9)
        length = struct.unpack("<Q", head[1:])[0] if len(head) == 9 else 0
        if len(head) < 9 or length > 4 * MAX_TEXT:  # bytes of a character in UTF-8
            raise EOFError("the child has ended")
        data = self._process.stdout.read(length)
        if len(data) < length:
            raise EOFError("the child has ended")
        if head[:1] == _TEXT:
            return RenderResult(data.decode("utf-8", "surrogatepass"))
        return RenderResult(None, **json.loads(data))

    def why_ended(self) -> RenderResult:
        """The reason of the child's end, as text."""
        self.end(wait_s=5)
        if self._process.returncode == -signal.SIGPROF:
            return RenderResult(None, "limit", f"takes more than {MAX_CPU_S:g} s of processor time")
        return RenderResult(None, "limit", f"ends its process (exit code {self._process.returncode})")

    def end(self, wait_s: float = 0) -> None:
        """End it, after waiting for it to end by itself."""
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):  # of what was not sent
                    stream.close()


_children: list[_Child] = []
_starting = threading.Lock()


def _child() -> _Child:
    """The child of this process, started when it is first needed and after one that ended."""
    with _starting:
        if _children and (_children[0].pid != os.getpid() or not _children[0].is_alive):
            _children.pop().end()
        if not _children:
            _children.append(_Child())
        return _children[0]


@atexit.register
def _end_child() -> None:
    for child in _children:
        if child.pid == os.getpid():
            child.end()


# ----------------------------------------------------------------------------------------------------------- the child


def main() -> None:
    """Answer requests until standard input ends."""
    import resource

    from soka_serve.io.child_signals import default_signals

    default_signals(shares_terminal=True)  # SIGPROF keeps the time limit
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    for limit, value in ((resource.RLIMIT_AS, MAX_MEMORY), (resource.RLIMIT_CORE, 0)):
        with suppress(OSError, ValueError):  # not on every system; the time limit holds
            resource.setrlimit(limit, (value, value))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    accounts: dict[tuple[str, str], _RenderBudget] = {}
    while (head := _read_frame(requests)) is not None and (body := _read_frame(requests)) is not None:
        kind, source = pickle.loads(head)
        account = accounts.setdefault((kind, source), _RenderBudget(MAX_CPU_S, MAX_TEXT))
        rows = pickle.loads(body) or [None]
        account.text += len(rows) * (MEAN_TEXT + len(source)) + _GROWTH * len(body)
        del head, body
        before = time.process_time()
        # At its end the kernel ends this process.
        signal.setitimer(signal.ITIMER_PROF, max(0.0, min(account.cpu_s, MAX_CPU_S)))
        for row in rows:
            text = _rendered(kind, source, row, account) if account.cpu_s > 0 else _OVERSPENT
            if isinstance(text, str):
                _write_frame(answers, text.encode("utf-8", "surrogatepass"), _TEXT)
            else:
                _write_frame(answers, json.dumps(text).encode(), _PROBLEM)
        signal.setitimer(signal.ITIMER_PROF, 0)
        account.cpu_s += len(rows) * MEAN_CPU_S - (time.process_time() - before)
        answers.flush()


@dataclass
class _RenderBudget:
    """What a template may still take: processor time in seconds, characters of text. Each row adds to it."""

    cpu_s: float
    text: int


def _write_frame(stream: BinaryIO, data: bytes, kind: bytes = b"") -> None:
    stream.write(kind + struct.pack("<Q", len(data)))
    stream.write(data)


def _read_frame(stream: BinaryIO) -> bytes | None:
    head = stream.read(8)
    return stream.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else None


def _rendered(kind: str, source: str, row: Mapping[str, Any] | None, account: _RenderBudget) -> str | dict[str, Any]:
    """The text for a row, or what is wrong."""
    from jinja2 import TemplateSyntaxError, UndefinedError

    from soka_serve.manifest.template_env import NullValueError

    try:
        template = _template(kind, source)
        parts, left = [], min(MAX_TEXT, account.text)
        for part in template.generate(row) if row is not None else ():
            parts.append(part)
            left -= len(part)
            if left < 0:
                return _TOO_LONG
        text = "".join(parts)
        account.text -= len(text)
        return text
    except TemplateSyntaxError as error:
        return {"problem": "syntax", "message": str(error.message)[:_MAX_MESSAGE], "line": error.lineno}
    except UndefinedError as error:
        return {"problem": "undefined", "message": str(error.message)[:_MAX_MESSAGE]}
    except NullValueError:
        return {"problem": "null"}
    except MemoryError:
        return {"problem": "limit", "message": f"takes more than {MAX_MEMORY >> 20} MiB of memory"}
    except RecursionError:
        return {"problem": "limit", "message": "calls itself too deeply"}
    except Exception as error:  # noqa: BLE001 - whatever a template can raise is the template's
        return {"problem": "fails", "message": str(error)[:_MAX_MESSAGE], "error": type(error).__name__}


@lru_cache(maxsize=64)
def _template(kind: str, source: str) -> Any:
    from soka_serve.manifest.template_env import environment_of

    return environment_of(kind).from_string(source)
