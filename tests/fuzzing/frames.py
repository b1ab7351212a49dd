"""Frames at random, as a judged program sends them to the process of the tests: values, or a WireError."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

from hypothesis import strategies as st

from soka_serve.evaluation.sandbox.wire import WireError, decode, encode, encode_frame, read_frame
from tests.fuzzing.limits import bounded
from tests.fuzzing.spoil import JSON, JSON_TEXTS
from tests.support.hostile_answers import FRAMES

_TAGS = st.sampled_from([*"icbyltszdrqDFTekmh", "x", ""])
_BODIES = JSON | st.sampled_from(
    [
        *("1e999999999", "1e1000000000", "1e-1000000000", "1/0", "-3/4", "sNaN", "inf", "00", "9" * 6000),
        *(10**30, -1, [1, 2, 0], [10**18, 0, -1], [10**30] * 3, ["date", "1-1-1"], ["time", ""], ["date", 3], [[], []]),
        *("int", "object", "print", "__loader__", "os", "antigravity", "1_0", "\ud800"),
    ]
)


def _many(tag: str, count: int, step: int) -> object:
    """A set, list or dict of numbers, which have one hash where the step is 2**61 - 1."""
    numbers = [{"i": hex(k * step)} for k in range(count)]
    return {tag: [[number, None] for number in numbers] if tag == "d" else numbers}


VALUES = st.recursive(
    JSON
    | st.builds(lambda count, digit: {"i": digit * count}, st.integers(1, 1_000_000), st.sampled_from(["f", "0x", "_"]))
    | st.builds(lambda tag, body: {tag: body}, _TAGS, _BODIES)
    | st.builds(
        _many,
        st.sampled_from("sdlzt"),
        st.integers(0, 100_000) | st.sampled_from([20_000, 100_000]),
        st.sampled_from([2**61 - 1, 1, 2**64]),
    ),
    lambda inner: st.builds(
        lambda tag, items: {tag: [[item, item] for item in items] if tag == "d" else items},
        st.sampled_from("lszdtq"),
        st.lists(inner, max_size=4),
    ),
    max_leaves=8,
) | st.builds(lambda depth: json.loads('{"l": [' * depth + "]}" * depth), st.integers(1, 150))


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """What stands on the pipe: a frame, whole or cut, too long, or of anything."""
    kind = draw(st.sampled_from(["value", "value", "value", "known", "json", "text", "bytes", "length"]))
    if kind == "bytes":
        return draw(st.binary(max_size=40))
    if kind == "length":
        return draw(st.integers(0, 2**32 - 1)).to_bytes(4, "big") + draw(st.binary(max_size=40))
    if kind in ("json", "text"):
        body = (json.dumps(draw(JSON)) if kind == "json" else draw(JSON_TEXTS)).encode()
        return len(body).to_bytes(4, "big") + body
    message: Any = {"value": draw(VALUES)} if kind == "value" else FRAMES[draw(st.sampled_from(sorted(FRAMES)))]
    try:
        frame = encode_frame(message)
    except WireError:  # longer than is read
        frame = encode_frame(message, 1 << 30)
    return frame[: draw(st.integers(0, len(frame)))] if draw(st.integers(0, 7)) == 7 else frame


def check_frame(frame: bytes) -> bool:
    """It is read and its value decoded, or a WireError says that it is none; returns whether there was a value."""
    out, into = os.pipe()
    writer = threading.Thread(target=_write, args=(into, frame))
    writer.start()
    try:
        with bounded():
            message = read_frame(out)
            values = [] if message is None else [message.get("value"), *_parts(message.get("names"))]
            found = [decode(value, _Handle) for value in values]
            again = encode(found[0], lambda value: int(value.number)) if found else None
        assert again is None or isinstance(again, bool | int | float | str | dict)
        return bool(found)
    except WireError:
        return False
    finally:
        os.close(out)
        writer.join()


class _Handle:
    def __init__(self, number: int) -> None:
        self.number = number


def _parts(names: object) -> list[object]:
    return list(names.values()) if isinstance(names, dict) else []


def _write(into: int, frame: bytes) -> None:
    try:
        view = memoryview(frame)
        while view:
            view = view[os.write(into, view) :]
    except BrokenPipeError:  # it was refused by its length
        pass
    finally:
        os.close(into)
