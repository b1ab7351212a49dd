"""Adapters that are small on the disk and ask a reader for GiBs, for years, or for pages of text.

Each kind is a function that spoils a copy of a good adapter of the embedded base, and a part of the refusal.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from soka_serve.adapter.format import CONFIG_FILE, KEY_PREFIX, LOCK_FILE, WEIGHTS_FILE

Spoil = Callable[[Path], object]
Kinds = dict[str, tuple[Spoil, str]]

# A match of this takes a backtracking engine time that doubles with each character of the name: years.
CATASTROPHE = r"((a|[a-z_.0-9])*)*(([a-z]|[a-z_.0-9])+)+!"
GIB = 1 << 30


def edit_config(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        change(config)
        (folder / CONFIG_FILE).write_text(json.dumps(config))

    return edit


def set_config(**values: Any) -> Spoil:
    return edit_config(lambda config: config.update(values))


def write_text(name: str, text: str) -> Spoil:
    return lambda folder: (folder / name).write_text(text)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(header)) + header + data


def write_header(header: bytes, data_bytes: int = 0) -> Spoil:
    """Weights with this header; the data are a hole."""

    def write(folder: Path) -> None:
        (folder / WEIGHTS_FILE).write_bytes(with_header(header))
        os.truncate(folder / WEIGHTS_FILE, 8 + len(header) + data_bytes)

    return write


def header_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """The header of float32 tensors, and the size of their data, bytes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return json.dumps(header).encode(), end


def zeros(shapes: Mapping[str, tuple[int, ...]]) -> Spoil:
    """Weights of float32 zeros, all of them on the disk."""
    header, size = header_of(shapes)
    return lambda folder: (folder / WEIGHTS_FILE).write_bytes(with_header(header, bytes(size)))


def hole(name: str) -> Spoil:
    """Make a file 3 GiB long, of which nothing more than before is on the disk."""

    def lengthen(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, 3 * GIB)

    return lengthen


def module(layer: int, name: str) -> str:
    """Full name of a projection of the embedded base: "q" to "down"."""
    return f"model.layers.{layer}.{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj"


def soka_in_a_hole(folder: Path) -> None:
    """11 GiB of factors that config and header agree on."""
    shape = (1, 1 << 31, 1 << 19, 1 << 10)
    names = [f"{KEY_PREFIX}{module(0, 'q')}.soka_{part}" for part in ("left", "right", "sigma")]
    set_config(soka_modules={module(0, "q"): {"rank": 1, "shape": list(shape)}})(folder)
    write_header(*header_of(dict(zip(names, ((1, *shape[:2]), (1, *shape[2:]), (1,)), strict=True))))(folder)


def many(count: int, ends: tuple[str, ...]) -> Spoil:
    """Modules that no model has, with tensors of one value."""
    names = [f"{KEY_PREFIX}model.layers.{i}.nowhere.{end}" for i in range(count) for end in ends]
    return zeros(dict.fromkeys(names, (1, 1)))


def many_soka(folder: Path) -> None:
    set_config(soka_modules={f"nowhere.{i}": {"rank": 1, "shape": [1, 1, 1, 1]} for i in range(20_000)})(folder)
    names = [f"{KEY_PREFIX}nowhere.{i}.soka_{part}" for i in range(20_000) for part in ("left", "right", "sigma")]
    zeros({name: (1,) if name.endswith("sigma") else (1, 1, 1) for name in names})(folder)


_TWICE = b"{" + b",".join(b'"name%d":{}' % (i % 100_000) for i in range(200_000)) + b"}"
_DIMENSIONS = json.dumps({"w": {"dtype": "F32", "shape": [9] * 60_000, "data_offsets": [0, 0]}}).encode()
_LONG_NAME = json.dumps({"n" * 200_000: {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}).encode()

# For every kind of adapter.
WEIGHTS: Kinds = {
    "100,000 names twice in the header": (write_header(_TWICE), "header"),
    "11 names twice in the header": (
        write_header(b"{" + b",".join(b'"n%02d":{}' % (i % 11) for i in range(22)) + b"}"),
        "occur twice: n00, n01, n02, n03, n04, n05, n06, n07, n08, n09, and 1 more",
    ),
    "60,000 dimensions": (write_header(_DIMENSIONS), "expected dtype, shape and data_offsets"),
    "a name of 200,000 characters": (write_header(_LONG_NAME), "printable characters"),
    "a name with a line break": (
        write_header(b'{"a\\nb": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', 4),
        "printable characters",
    ),
    "weights are a hole": (hole(WEIGHTS_FILE), "of which"),
    "300,000 tensors": (many(100_000, ("a", "b", "c")), "header would take"),
}
CONFIG: Kinds = {
    "config in a hole": (hole(CONFIG_FILE), "too large"),
    "config of 100 MB": (write_text(CONFIG_FILE, " " * 100_000_000 + "{}"), "too large"),
    "config nested deeply": (write_text(CONFIG_FILE, '{"r": ' + "[" * 50_000), "not JSON that can be read"),
    "config with an endless number": (write_text(CONFIG_FILE, '{"r": ' + "9" * 50_000 + "}"), "not JSON"),
    "config with a key twice": (
        write_text(CONFIG_FILE, '{"peft_type": "SOKA", "peft_type": "LOKR"}'),
        "occur twice: peft_type",
    ),
}
LOCK: Kinds = {
    "lock in a hole": (hole(LOCK_FILE), "too large"),
    "lock of 100 MB": (write_text(LOCK_FILE, "#" * 100_000_000), "too large"),
    "lock with a key of 30,000 parts": (write_text(LOCK_FILE, "a" + ".a" * 30_000 + " = 1\n"), "parts (at line 1)"),
    "lock with a table of 30,000 parts": (write_text(LOCK_FILE, "\n[a" + " . a" * 30_000 + "]\n"), "parts (at line 2)"),
    "lock with a key of quoted parts": (
        write_text(LOCK_FILE, "x = {s = '''\"''', \"=\"" + '."="' * 30_000 + " = 1}\n"),
        "parts (at line 1)",
    ),
    "lock nested deeply": (write_text(LOCK_FILE, "a = " + "[" * 30_000), "brackets more than"),
    "lock with tables nested deeply": (write_text(LOCK_FILE, "a = " + "{a = " * 10_000), "brackets more than"),
}
SOKA: Kinds = {
    "SoKA in a hole": (soka_in_a_hole, "of which"),
    "SoKA with 20,000 modules": (many_soka, "too large"),
    "SoKA with 20,000 tensors too many": (many(20_000, ("soka_left",)), "header would take"),
    "SoKA with 3,000 unknown keys": (set_config(**{f"key{i}": 1 for i in range(3000)}), "and 2990 more"),
    "SoKA with 3,000 odd modules": (set_config(soka_modules={f"m{i}": 1 for i in range(3000)}), "and 2990 more"),
}


def lokr_products(folder: Path) -> None:
    """5 MB that are 29 GiB when multiplied out: each matrix below 1 GiB, 28 of them."""
    tensors = {}
    for name in (module(layer, part) for layer in range(4) for part in ("q", "k", "v", "o", "gate", "up", "down")):
        key = f"{KEY_PREFIX}{name}.lokr_"
        tensors |= {key + "w1": torch.ones(1, 1), key + "w2_a": torch.ones(16_000, 1)}
        tensors[key + "w2_b"] = torch.ones(1, 16_000)
    save_file(tensors, folder / WEIGHTS_FILE)


LOKR: Kinds = {
    "LoKr with a catastrophic rank pattern": (set_config(rank_pattern={CATASTROPHE: 2}), ""),
    "LoKr with a catastrophic alpha pattern": (set_config(alpha_pattern={CATASTROPHE: 2}), ""),
    "LoKr with a back reference": (set_config(rank_pattern={r"(q|v)_\1": 2}), "invalid escape sequence"),
    "LoKr with repeats of repeats": (set_config(rank_pattern={"((.{99}){99}){99}": 2}), "repeats such as"),
    "LoKr with 3,000 patterns": (set_config(rank_pattern={f"(.*a.*)*{i}": 2 for i in range(3000)}), "pattern"),
    "LoKr with a pattern of 100 KB": (set_config(rank_pattern={"q" * 100_000: 2}), "characters, at most"),
    "LoKr products of 29 GiB": (lokr_products, "which is too large"),
    "LoKr with 20,000 modules": (many(20_000, ("lokr_w1", "lokr_w2")), "header would take"),
}


def lora_in_a_hole(folder: Path) -> None:
    names = [f"{KEY_PREFIX}{module(0, 'q')}.lora_{part}.weight" for part in "AB"]
    write_header(*header_of({names[0]: (4, 700_000_000), names[1]: (128, 4)}))(folder)


def pickle_of_gib(folder: Path) -> None:
    """A zip whose storage of 4 GiB of zeros is compressed."""
    (folder / WEIGHTS_FILE).unlink()
    torch.save({"base_model.model.w.lora_A.weight": torch.ones(4)}, folder / "plain.bin")
    with (
        zipfile.ZipFile(folder / "plain.bin") as plain,
        zipfile.ZipFile(folder / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for part in plain.infolist():
            data = plain.read(part)
            packed.writestr(part.filename, bytes(1 << 26) if part.filename.endswith("data/0") else data)


def pickle_of_strides(folder: Path) -> None:
    """One value on the disk that stands for 16 GiB of them."""
    (folder / WEIGHTS_FILE).unlink()
    spread = torch.ones(1).expand(65_536, 65_536)
    torch.save({f"{KEY_PREFIX}{module(0, 'q')}.lora_A.weight": spread}, folder / "adapter_model.bin")


LORA: Kinds = {
    "LoRA in a hole": (lora_in_a_hole, "of which"),
    "LoRA with a catastrophic rank pattern": (set_config(rank_pattern={CATASTROPHE: 2}), ""),
    "LoRA with a back reference": (set_config(alpha_pattern={r"(q|v)_\1": 2}), "invalid escape sequence"),
    "LoRA with 20,000 modules": (many(20_000, ("lora_A.weight", "lora_B.weight")), "header would take"),
    "LoRA in a compressed pickle": (pickle_of_gib, "compressed"),
    "LoRA in a pickle of 16 GiB": (pickle_of_strides, "too large"),
}
