"""Manifests and adapters spoilt at random, and what must hold of whatever is done with them.

Used with few examples by tests/unit/test_fuzz.py and with thousands by eval/fuzz.py.
"""

from __future__ import annotations

import json
import shutil
import signal
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from hypothesis import strategies as st
from safetensors import safe_open

from soka_serve.adapter import CONFIG_FILE, LOCK_FILE, WEIGHTS_FILE, read_adapter, write_adapter
from soka_serve.builtin import base_directory
from soka_serve.checkpoint import Checkpoint
from soka_serve.cli import main
from soka_serve.errors import SokaError
from soka_serve.kron import Factors
from soka_serve.manifest import starter_manifest
from soka_serve.shapes import FactorShape

ROOT = Path(__file__).resolve().parent.parent
HANG_S = 60

# ----------------------------------------------------------------------------------------------------------- manifests

_WORDS = "schema base adapt train data rank policy fixed energy layers shape modules"
_VALUE_WORDS = "1 0x1F -3.5 nan inf true 1979-05-27 07:32:00 '8' 'tiny'"
_MARKS = [*"[]{}=.,#\"'\n \\\t\0é", "[[", "]]", '"""', "'''", "\r\n", "\U0001f600", "\ufeff"]
TOKENS = st.sampled_from([*_WORDS.split(), *_VALUE_WORDS.split(), *_MARKS])
_VALUES = st.sampled_from(
    [
        *["1", "0", "-1", "true", "1.5", "inf", "nan", "'x'", "''", "1979-05-27", "1e400", "0x" + "f" * 300],
        *["[]", "[1]", "['q_proj']", "{}", "[{}]", "[[1], [2]]", "[" * 30 + "]" * 30],
        *["{ policy = 'budget' }", "{ policy = 3 }"],
    ]
)
_SOURCES = st.sampled_from(
    [*(path.read_text() for path in sorted((ROOT / "manifests").rglob("*.toml"))), starter_manifest("x")]
)
_HEADERS = st.sampled_from(["[base]", "[[base]]", "[adapt]", "[[adapt]]", "[train.data]", "[x.y]"])
_LINE_EDITS = st.sampled_from(["drop", "repeat", "value", "key", "cut", "insert", "header", "uncomment"])


@st.composite
def spoilt_manifests(draw: st.DrawFn) -> str:
    """The text of a manifest that ships, one to four of its lines changed."""
    lines = draw(_SOURCES).split("\n")
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(lines) - 1))
        kind, line = draw(_LINE_EDITS), lines[i]
        if kind == "drop" and len(lines) > 1:
            del lines[i]
        elif kind == "repeat":
            lines.insert(i, line)
        elif kind == "value" and "=" in line:
            lines[i] = line.split("=")[0] + "= " + draw(_VALUES)
        elif kind == "key" and "=" in line:
            lines[i] = draw(TOKENS) + " =" + line.split("=", 1)[1]
        elif kind == "cut":
            lines[i] = line[: draw(st.integers(0, len(line)))]
        elif kind == "insert":
            at = draw(st.integers(0, len(line)))
            lines[i] = line[:at] + draw(TOKENS) + line[at:]
        elif kind == "header":
            lines[i] = draw(_HEADERS)
        elif kind == "uncomment":
            lines[i] = line.removeprefix("# ")
    return "\n".join(lines)


def check_plan(text: str, folder: Path) -> bool:
    """`soka-serve plan` of a manifest plans it or refuses it with a message, and writes nothing beside it.

    Returns:
        Whether it was planned.
    """
    file = folder / "manifest.toml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    done = run("plan", str(file))
    left = [path for path in folder.iterdir() if path.name != "manifest.toml"]
    assert not left, left
    return done.exit_code == 0


# ------------------------------------------------------------------------------------------------------------ adapters

_DTYPES = st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "X", "", None, 3])
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["SOKA", "LORA", "../../etc/passwd", "model.layers.0.self_attn.q_proj"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
_SIZES = st.integers(-2, 20) | st.sampled_from([2**31, 2**40, 2**62, 2**63, 2**64])
_FILES = (CONFIG_FILE, WEIGHTS_FILE, LOCK_FILE)
_FILE_EDITS = ("flip", "cut", "append", "replace", "delete", "folder", "link", "swap", "header", "config", "values")


def write_good_adapter(folder: Path) -> None:
    """An adapter of the embedded base, on three projections of its first layer."""
    generator = torch.Generator().manual_seed(0)
    checkpoint = Checkpoint.open(base_directory())
    factors = {}
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        out_features, in_features = checkpoint.tensors[f"model.layers.0.{name}.weight"].shape
        m, n, p, q = FactorShape(8, 8, out_features // 8, in_features // 8)
        left = torch.randn(2, m, n, generator=generator)
        right = torch.randn(2, p, q, generator=generator)
        factors[f"model.layers.0.{name}"] = Factors(left, right, torch.full((2,), 0.01))
    lock = {"base": {"name": "tiny", "sha256": checkpoint.sha256()}}
    write_adapter(folder, factors, base_model=str(base_directory()), lock=lock)


def spoil_adapter(draw: st.DrawFn, folder: Path) -> None:
    """One to three changes to an adapter's files."""
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(_FILE_EDITS))
        if kind in ("header", "values"):
            file = folder / WEIGHTS_FILE
        elif kind == "config":
            file = folder / CONFIG_FILE
        else:
            file = folder / draw(st.sampled_from(_FILES))
        if not file.is_file() or file.is_symlink():
            continue  # an earlier change took it away
        _spoil_file(draw, kind, file)


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
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "link":
        file.unlink()
        file.symlink_to(draw(st.sampled_from(["nowhere", file.name, "/dev/zero", "/etc/passwd"])))
    elif kind == "swap":
        other = file.parent / draw(st.sampled_from(_FILES))
        if other.is_file():
            file.write_bytes(other.read_bytes())
            other.write_bytes(data)
    elif kind == "config":
        file.write_bytes(_spoil_config(draw, data))
    elif kind == "header":
        file.write_bytes(_spoil_header(draw, data))
    elif kind == "values" and len(data) > 4:  # of a float32: not a number, infinite, large, tiny
        value = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, 0.0]))
        place = len(data) - 4 * draw(st.integers(1, max(min(400, len(data) // 4), 1)))
        file.write_bytes(data[:place] + struct.pack("<f", value) + data[place + 4 :])


def _spoil_config(draw: st.DrawFn, data: bytes) -> bytes:
    try:
        config = json.loads(data)
    except ValueError:
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
            table[key] = draw(_JSON)
        elif action == "rename":
            table[draw(st.text(max_size=10))] = value
        break
    return json.dumps(config).encode()


def _spoil_header(draw: st.DrawFn, data: bytes) -> bytes:
    try:
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header: dict[str, Any] = json.loads(data[8:end])
        name = draw(st.sampled_from(sorted(header)))
        entry = header[name]
        action = draw(st.sampled_from(["dtype", "shape", "offsets", "rename", "delete", "any", "copy", "length"]))
        if action == "dtype":
            entry["dtype"] = draw(_DTYPES)
        elif action == "shape":
            entry["shape"] = draw(st.lists(_SIZES, max_size=4))
        elif action == "offsets":
            entry["data_offsets"] = draw(st.lists(_SIZES, max_size=3))
        elif action == "rename":
            header[draw(st.text(max_size=12) | st.just(name.replace("0", "1", 1)))] = header.pop(name)
        elif action == "delete":
            del header[name]
        elif action == "any":
            header[name] = draw(_JSON)
        elif action == "copy":
            header[name + "2"] = entry
        else:
            return struct.pack("<Q", draw(st.integers(0, 2**64 - 1))) + data[8:]
    except (ValueError, TypeError, KeyError, struct.error, AttributeError):
        return data  # no header any more
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + data[end:]


def check_adapter(folder: Path) -> bool:
    """A spoilt adapter is read with finite factors or refused, by reader, `inspect` and `merge` alike; a merge that
    fails leaves nothing, and one that does not leaves a whole model.

    Returns:
        Whether it could still be read.
    """
    read = None
    with suppress(SokaError), limited(HANG_S):
        read = read_adapter(folder)
    if read is not None:
        for name in read.factors:
            delta = read.delta_factors(name)
            assert all(torch.isfinite(t).all() for t in (delta.left, delta.right, delta.sigma)), name
    with tempfile.TemporaryDirectory() as other:
        run("inspect", str(folder))
        out = Path(other) / "merged"
        done = run("merge", str(folder), "--base", "tiny", "--out", str(out), "--no-verify")
        if done.exit_code:
            assert not list(Path(other).iterdir()), list(Path(other).iterdir())
        else:
            assert read is not None, "merged what cannot be read"
            assert [path.name for path in Path(other).iterdir()] == ["merged"]
            with safe_open(out / "model.safetensors", framework="pt") as file:
                assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118
            json.loads((out / "config.json").read_text())
    return read is not None


# -------------------------------------------------------------------------------------------------------------- both


def run(*arguments: str) -> Result:
    """A command, in this process: done, or refused with a message, exit code 2 and no traceback."""
    with limited(HANG_S):
        done = CliRunner().invoke(main, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code in (0, 2), (done.exit_code, done.output)
    assert "Traceback" not in done.output, done.output
    assert done.exit_code == 0 or "rror" in done.output, done.output
    return done


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise where it takes longer."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def copy_of(good: Path) -> Iterator[Path]:
    """A copy of an adapter to spoil."""
    with tempfile.TemporaryDirectory() as place:
        yield Path(shutil.copytree(good, Path(place) / "adapter"))
