"""The tests' own process: it runs setup and tests against the program's answers. Standard library only.

Loaded by path into the sandbox's bare interpreter, so it gets `wire` handed over instead of importing it.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from soka_serve.evaluation.sandbox import wire


class _ProgramError(Exception):
    """The program raised, or answered with something that is not plain data."""


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
    """Handle of an object of the program that is not plain data: it can be called and inspected, never compared."""

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


def run_tests(job: int, requests: int, replies: int, result: int) -> None:
    """Run setup and tests, and report whether all of them held.

    Args:
        job: descriptor with one frame: setup, tests, names, and the nonce that proves a pass.
        requests, replies: descriptors to and from the program's process.
        result: descriptor for the report, one frame.
    """

    def report(**fields: Any) -> None:
        wire.write_frame(result, {"passed": False, **fields})

    given = wire.read_frame(job)
    os.close(job)
    if given is None:
        return
    channel = _Channel(requests, replies)
    at = "before the tests"
    try:
        scope = _scope(given, channel, channel.read().get("names"))
        for index, source in enumerate([given["setup"], *given["tests"]]):
            at = f"in test {index}" if index else "in the setup of the tests"
            exec(compile(source, "<tests>", "exec", dont_inherit=True), scope)
    except _ClosedError:
        report(closed=True)
    except AssertionError:
        report(reason=f"assert failed {at}")
    except _ProgramError as error:
        report(reason=f"{error} ({at})")
    except BaseException as error:  # noqa: BLE001 - the tests run the dataset's code
        report(reason=f"{wire.described(error)} ({at})")
    else:
        report(passed=True, nonce=given["nonce"])


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
        module = str(data["m"]) if isinstance(data, dict) and "m" in data else None
        top = module.partition(".")[0] if module else None
        if not wanted and name in sys.stdlib_module_names and name != module:
            continue  # a test that says `math` means Python's
        if module is None:
            scope[name] = channel.value(data)
        elif top in sys.stdlib_module_names:
            # A module that the program imported is imported anew: the program may have changed its own.
            scope[name] = importlib.import_module(module)
    return scope


def _names_in(sources: Sequence[str]) -> set[str]:
    nodes = (node for source in sources for node in ast.walk(ast.parse(source)))
    return {node.id for node in nodes if isinstance(node, ast.Name)}
