"""Changes to an adapter's files, of whatever kind it is: at random, and those that hostile adapters are made of."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from safetensors import SafetensorError

from soka_serve.adapter.format import CONFIG_FILE, LOCK_FILE, WEIGHTS_FILE
from tests.fuzzing.limits import is_plain
from tests.support.hostile_adapters import CATASTROPHE, GIB, Kinds, with_header

_DTYPES = st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "X", "", None, 3])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["SOKA", "LORA", "../../elsewhere", "model.layers.0.self_attn.q_proj"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
_SIZES = st.integers(-2, 20) | st.sampled_from([2**31, 2**40, 2**62, 2**63, 2**64])
_SHAPES = (
    st.lists(_SIZES, max_size=4)
    | st.integers(5, 60_000).map(lambda count: [9] * count)
    | st.sampled_from([[2**63], [1] * 60_000, [2**62, 0], [0]])
)
# Parts of regular expressions: alone, side by side, and in groups that are repeated.
_PIECES = st.sampled_from(
    [
        *("q_proj", "v_proj|down_proj", ".*", "[a-z_.0-9]", "layers.0", "q_proj)|(.*o_proj", "\ud800", "x{,3}"),
        *("^", "("),
        *(CATASTROPHE, "((a|[a-z_.0-9])*)*(([a-z]|[a-z_.0-9])+)+!", "(.*a.{9}b.*){9}!", r"\d{2}", r"(q|v)_\1", "!"),
    ]
)
PATTERNS = st.recursive(
    _PIECES,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=4).map("".join)
        | st.tuples(inner, st.sampled_from(["*", "+", "{9}", "{99}", "?"])).map(lambda two: f"({two[0]}){two[1]}")
        | st.tuples(inner, st.integers(1, 2000)).map(lambda two: (two[0] * two[1])[:100_000])
    ),
    max_leaves=6,
)
_COUNTS = st.integers(1, 100_000)
# Text of a lock or a config that costs a parser more than its length: a start, a part that is repeated, an end.
TOML_TEXTS = st.builds(
    lambda parts, count, more: parts[0] + parts[1] * count + parts[2] + more,
    st.sampled_from(
        [
            *(
                ("a", ".a", " = 1"),
                ("[a", ".a", "]"),
                ("x = {a", ".a", " = 1}"),
                ("", '\\"""\n', ""),
                ("", '"""\\', ""),
            ),
            *(("x = ", "[", ""), ("x = ", "{a = ", ""), ("x = [", "[],", "]"), ("", "'''", ""), ('"', '\\"', '"')),
            *(("x = ", "9", ""), ("x = 0.", "9", "e999"), ("", "#", ""), ("", "[[a]]\n", ""), ("", "\0", "")),
            *(("x = '''\"''', \"=\"", '."="', " = 1"), ('x = """a"""""\ny = {', "a.", 'a = \'"""\'}')),
        ]
    ),
    _COUNTS | st.sampled_from([32, 33, 20_000, 30_000, 50_000]),
    st.sampled_from(["", "\n", "\nb = 1\n", "\n[base]\nsha256 = 'x'\n"]),
)
JSON_TEXTS = st.builds(
    lambda parts, count: parts[0] + parts[1] * count + parts[2],
    st.sampled_from(
        [("", "[", ""), ('{"r": ', "[", ""), ('{"r": ', "9", "}"), ("", '{"a": ', ""), ("{}", " ", ""), ("", "\0", "")]
    ),
    _COUNTS,
)
_NAMES = st.sampled_from(["\x1b[31m\n", "\ud800", "\0", "../x", "a.lokr_w1", "a.soka_left"]) | st.text(max_size=12)
_LONG_NAMES = st.builds(lambda name, count: (name * count)[:count], _NAMES, st.sampled_from([12, 12, 100, 1000, 10**6]))


def _link_to_own(file: Path) -> None:
    """A link to a file of the user's beside it."""
    other = file.with_name(f"{file.name}.mine")
    if not os.path.lexists(other):
        other.write_text("mine")
    file.symlink_to(other.name)


NODES: dict[str, Callable[[Path], object]] = {
    "folder": lambda file: file.mkdir(),
    "folder with a file": lambda file: (file.mkdir(), (file / "mine").write_text("mine")),
    "pipe": lambda file: os.mkfifo(file),
    "nowhere": lambda file: file.symlink_to("nowhere"),
    "loop": lambda file: file.symlink_to(file.name),
    "endless": lambda file: file.symlink_to("/dev/zero"),
    "device": lambda file: file.symlink_to("/dev/full"),
    "elsewhere": lambda file: _link_to_own(file),
}
"""What stands where a file is expected. No link leads out of the case's own folder but to devices that keep nothing."""

_FILES = (CONFIG_FILE, WEIGHTS_FILE, LOCK_FILE)
_EDITS = ("flip", "cut", "append", "replace", "delete", "node", "swap", "header", "config", "values", "hole")
_HOSTILE_EDITS = ("text", "pattern", "name", "beside", "kind")


def spoil_files(draw: st.DrawFn, folder: Path, kinds: Kinds) -> None:
    """One to three changes to an adapter's files.

    Args:
        draw: what is changed.
        folder: of the adapter; the folder that it is in is changed, too.
        kinds: of hostile adapters, by name.
    """
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from([*_EDITS, *_HOSTILE_EDITS]))
        if kind == "kind":
            _make_hostile(draw, folder, kinds)
        elif kind == "beside":
            beside = folder.parent / LOCK_FILE
            if not os.path.lexists(beside):
                NODES[draw(st.sampled_from(sorted(NODES)))](beside)
        else:
            fixed = {"header": WEIGHTS_FILE, "values": WEIGHTS_FILE, "name": WEIGHTS_FILE, "config": CONFIG_FILE}
            name = fixed.get(kind) or (CONFIG_FILE if kind == "pattern" else draw(st.sampled_from(_FILES)))
            # An earlier change may have taken the file away, or put something in its place that is never written to.
            if is_plain(folder / name):
                _spoil_file(draw, kind, folder / name)


def _make_hostile(draw: st.DrawFn, folder: Path, kinds: Kinds) -> None:
    chosen = kinds[draw(st.sampled_from(sorted(kinds)))][0]
    if all(is_plain(file) for file in folder.iterdir()):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError):
            chosen(folder)  # of files that are spoilt already it makes what it can


def _spoil_file(draw: st.DrawFn, kind: str, file: Path) -> None:
    data = file.read_bytes()
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    if kind == "flip" and data:
        file.write_bytes(data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :])
    elif kind == "cut":
        file.write_bytes(data[:at])
    elif kind == "append":
        file.write_bytes(data + draw(st.binary(min_size=1, max_size=40)))
    elif kind == "replace":
        file.write_bytes(draw(st.binary(max_size=60)))
    elif kind == "delete":
        file.unlink()
    elif kind == "node":
        file.unlink()
        NODES[draw(st.sampled_from(sorted(NODES)))](file)
    elif kind == "hole":
        os.truncate(file, draw(st.sampled_from([3 * GIB, 2 << 20, 1 << 40]) | st.integers(0, 3 * GIB)))
    elif kind == "swap":
        other = file.parent / draw(st.sampled_from(_FILES))
        if is_plain(other):
            file.write_bytes(other.read_bytes())
            other.write_bytes(data)
    elif kind == "text":
        text = draw(JSON_TEXTS if file.name == CONFIG_FILE else TOML_TEXTS)
        file.write_bytes(draw(st.sampled_from([b"", data])) + text.encode("utf-8", "surrogatepass"))
    elif kind in ("config", "pattern"):
        file.write_bytes((_spoil_config if kind == "config" else _add_patterns)(draw, data))
    elif kind in ("header", "name"):
        file.write_bytes((_spoil_header if kind == "header" else _add_name)(draw, data))
    elif kind == "values" and len(data) > 4:  # of a float32: not a number, infinite, large, tiny
        value = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, 0.0]))
        place = len(data) - 4 * draw(st.integers(1, max(min(400, len(data) // 4), 1)))
        file.write_bytes(data[:place] + struct.pack("<f", value) + data[place + 4 :])


def _add_patterns(draw: st.DrawFn, data: bytes) -> bytes:
    with suppress(ValueError, RecursionError, AttributeError, TypeError):
        config = json.loads(data)
        patterns = st.dictionaries(PATTERNS, st.sampled_from([2, 4, 0, -1, None, "x"]), min_size=1, max_size=3)
        config[draw(st.sampled_from(["rank_pattern", "alpha_pattern"]))] = draw(patterns)
        return json.dumps(config).encode()
    return data


def _spoil_config(draw: st.DrawFn, data: bytes) -> bytes:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        return data
    table = config
    while isinstance(table, dict) and table:
        key = draw(st.sampled_from(sorted(table)))
        if isinstance(table[key], dict) and table[key] and draw(st.booleans()):
            table = table[key]
            continue
        action = draw(st.sampled_from(["set", "delete", "rename"]))
        value = table.pop(key)
        if action == "set":
            table[key] = draw(JSON)
        elif action == "rename":
            table[draw(st.text(max_size=10))] = value
        break
    return json.dumps(config).encode()


def _split_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data; raises one of _NO_HEADER."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


_NO_HEADER = (ValueError, TypeError, KeyError, IndexError, struct.error, AttributeError, RecursionError)


def _spoil_header(draw: st.DrawFn, data: bytes) -> bytes:
    try:
        header, rest = _split_header(data)
        name = draw(st.sampled_from(sorted(header)))
        entry = header[name]
        action = draw(st.sampled_from(["dtype", "shape", "offsets", "rename", "delete", "any", "copy", "length"]))
        if action == "dtype":
            entry["dtype"] = draw(_DTYPES)
        elif action == "shape":
            entry["shape"] = draw(_SHAPES)
        elif action == "offsets":
            entry["data_offsets"] = draw(st.lists(_SIZES, max_size=3))
        elif action == "rename":
            header[draw(_LONG_NAMES | st.just(name.replace("0", "1", 1)))] = header.pop(name)
        elif action == "delete":
            del header[name]
        elif action == "any":
            header[name] = draw(JSON)
        elif action == "copy":
            header[name + "2"] = entry
        else:
            return struct.pack("<Q", draw(st.integers(0, 2**64 - 1))) + data[8:]
    except _NO_HEADER:
        return data
    return with_header(json.dumps(header).encode(), rest)


def _add_name(draw: st.DrawFn, data: bytes) -> bytes:
    """The same header with names once more, or with further ones."""
    try:
        header, rest = _split_header(data)
        names = draw(st.lists(st.sampled_from(sorted(header)) | _LONG_NAMES, min_size=1, max_size=4))
        entry = next(iter(header.values()))
    except _NO_HEADER:
        return data
    more = "".join(f", {json.dumps(name)}: {json.dumps(header.get(name, entry))}" for name in names)
    return with_header((json.dumps(header)[:-1] + more + "}").encode(), rest)


@contextmanager
def copy_of(good: Path) -> Iterator[Path]:
    """A copy of an adapter to spoil."""
    with tempfile.TemporaryDirectory() as place:
        yield Path(shutil.copytree(good, Path(place) / "adapter"))


def without(kinds: Kinds, names: Sequence[str]) -> Kinds:
    """All but those that take seconds each."""
    return {name: kind for name, kind in kinds.items() if name not in names}
