"""Frames over pipes, and plain data as JSON. Standard library only; loaded by path into a bare interpreter.

A program answers tests over a pipe. Only plain data crosses it by value: numbers, strings, bytes, lists, tuples, sets,
dicts and their like, always as the plain type. Anything else crosses as a handle, which has no value to compare.
"""

from __future__ import annotations

import builtins
import json
import os
import re
import socket
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from types import ModuleType
from typing import Any

MAX_FRAME_BYTES = 4 << 20

_SMALL = 1 << 53
_MAX_EQUAL_HASHES = 100  # of the keys of one set or dict


class WireError(Exception):
    """A frame that is cut off, too long, or not what it should be."""


def encode_frame(message: Mapping[str, Any], most_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """A message with its length in front.

    Raises:
        WireError: more than `most_bytes`.
    """
    body = json.dumps(message).encode("ascii")
    if len(body) > most_bytes:
        raise WireError(f"a message of {len(body)} bytes; at most {most_bytes}")
    return len(body).to_bytes(4, "big") + body


def write_frame(fd: int, message: Mapping[str, Any]) -> None:
    """Send one message."""
    write_all(fd, encode_frame(message))


def write_all(fd: int, data: bytes) -> None:
    """Write all of it, however many calls that takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read_frame(fd: int, most_bytes: int = MAX_FRAME_BYTES) -> dict[str, Any] | None:
    """Receive one message; None where the other side has closed before the first byte.

    Unbuffered: not a byte of the next message is read.

    Args:
        fd: descriptor of a pipe or socket.
        most_bytes: of the message's body.

    Raises:
        WireError: a message that is cut off, too long, or no JSON object.
    """
    return _read_body(fd, _read(fd, 4), most_bytes)


def send_with_descriptors(to: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """Send one short message over a Unix socket, with descriptors that the receiver gets copies of."""
    frame = encode_frame(message)
    to.sendall(frame[socket.send_fds(to, [frame], list(descriptors)) :])


def receive_with_descriptors(source: socket.socket, count: int) -> tuple[dict[str, Any] | None, list[int]]:
    """Receive what `send_with_descriptors` sent: the message, None at the end, and at most `count` descriptors."""
    head, descriptors, _, _ = socket.recv_fds(source, 4, count)
    if 0 < len(head) < 4:
        head += _read(source.fileno(), 4 - len(head))
    return _read_body(source.fileno(), head, MAX_FRAME_BYTES), descriptors


def _read_body(fd: int, head: bytes, most_bytes: int) -> dict[str, Any] | None:
    if not head:
        return None
    length = int.from_bytes(head, "big")
    if len(head) < 4 or length > most_bytes:
        raise WireError("a frame without an end")
    body = _read(fd, length)
    if len(body) < length:
        raise WireError("a frame without an end")
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise WireError("a frame that is not JSON") from None
    if not isinstance(message, dict):
        raise WireError("a frame that is not an object")
    return message


def _read(fd: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.read(fd, min(length, 1 << 16))
        if not part:
            break
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def described(error: BaseException) -> str:
    """Type and text of an exception, at most 300 characters, whatever its `__str__` does."""
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:  # noqa: BLE001
        return "an exception that cannot be shown"


def encode(value: Any, handle: Callable[[Any], int]) -> Any:
    """Plain data as JSON; `handle` numbers everything else."""

    def items(values: Any) -> list[Any]:
        return [encode(item, handle) for item in values]

    match value:
        case None | bool():
            return value
        case int():
            number = int.__add__(value, 0)  # an int subclass becomes an int
            return number if -_SMALL < number < _SMALL else {"i": hex(number)}
        case float():
            return float.__add__(value, 0.0)
        case complex():
            return {"c": [value.real, value.imag]}
        case str():
            return str.__str__(value)
        case bytes() | bytearray():
            return {"b" if isinstance(value, bytes) else "y": bytes(value).hex()}
        case list():
            return {"l": items(list.__iter__(value))}
        case tuple():
            return {"t": items(tuple.__iter__(value))}
        case set() | frozenset():
            return {"s" if isinstance(value, set) else "z": items(value)}
        case dict():
            return {"d": [[encode(k, handle), encode(v, handle)] for k, v in dict.items(value)]}
        case range():
            return {"r": [value.start, value.stop, value.step]}
        case deque():
            return {"q": items(value)}
        case Decimal() | Fraction():
            return {"D" if isinstance(value, Decimal) else "F": str(value)}
        case datetime() | date() | time():
            kind = "datetime" if isinstance(value, datetime) else "date" if isinstance(value, date) else "time"
            return {"T": [kind, value.isoformat()]}
        case timedelta():
            return {"e": [value.days, value.seconds, value.microseconds]}
        case type(__name__=name) if getattr(builtins, name, None) is value:
            return {"k": name}
        case ModuleType():
            return {"m": value.__name__}
        case _:
            return {"h": handle(value)}


def _builtin_type(name: str) -> type:
    found = vars(builtins)[name]
    if isinstance(found, type):
        return found
    raise WireError(f"not a type: {name}")


def _hashed(keys: list[Any]) -> list[Any]:
    """The keys of a set or a dict, which takes time with the square of how many have one hash."""
    if len(keys) > _MAX_EQUAL_HASHES and max(Counter(map(hash, keys)).values()) > _MAX_EQUAL_HASHES:
        raise WireError(f"more than {_MAX_EQUAL_HASHES} values with one hash")
    return keys


def _dict(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    _hashed([key for key, _ in pairs])
    return dict(pairs)


def _fraction(text: str) -> Fraction:
    """Of what `str` writes, which has no exponent: ten to the power of a billion takes years."""
    if not re.fullmatch(r"-?[0-9]+(/[0-9]+)?", text):
        raise WireError(f"not a fraction: {text!r:.80}")
    return Fraction(text)


_TIMES: Mapping[str, Callable[[str], Any]]
_TIMES = {"datetime": datetime.fromisoformat, "date": date.fromisoformat, "time": time.fromisoformat}


def decode(data: Any, handle: Callable[[int], Any]) -> Any:
    """What `encode` made JSON of; `handle` turns a number into the object that stands for it.

    Raises:
        WireError: data that `encode` does not make.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if not isinstance(data, dict) or len(data) != 1:
        raise WireError("not a value")
    ((tag, body),) = data.items()

    def items() -> list[Any]:
        return [decode(item, handle) for item in body]

    makers: Mapping[str, Callable[[], Any]] = {
        "i": lambda: int(body, 16),
        "c": lambda: complex(*body),
        "b": lambda: bytes.fromhex(body),
        "y": lambda: bytearray.fromhex(body),
        "l": items,
        "t": lambda: tuple(items()),
        "s": lambda: set(_hashed(items())),
        "z": lambda: frozenset(_hashed(items())),
        "d": lambda: _dict([(decode(k, handle), decode(v, handle)) for k, v in body]),
        "r": lambda: range(*body),
        "q": lambda: deque(items()),
        "D": lambda: Decimal(body),
        "F": lambda: _fraction(body),
        "T": lambda: _TIMES[body[0]](body[1]),
        "e": lambda: timedelta(*body),
        "k": lambda: _builtin_type(body),
        "h": lambda: handle(int(body)),
    }
    try:
        return makers[tag]()
    except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError, IndexError):
        raise WireError(f"not a value: {tag!r}") from None
