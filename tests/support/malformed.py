"""Malformed adapters: how each is made from a good one, and what the refusal must say.

A kind is a function that spoils a copy of a good adapter, and a part of the reason that has to be given. Those of SOKA
start from an adapter with BETA's shapes, the others from what PEFT writes for q, v, o and down.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

from soka_serve.adapter.format import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from tests.support import hostile_adapters as hostile
from tests.support.hostile_adapters import Kinds, Spoil, edit_config, module, set_config, with_header
from tests.support.serving import random_factors


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def edit(folder: Path) -> None:
        tensors = load((folder / WEIGHTS_FILE).read_bytes())
        change(tensors)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    return edit


def edit_header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Change what the header of the weights says, and leave the data as they are."""

    def edit(folder: Path) -> None:
        raw = (folder / WEIGHTS_FILE).read_bytes()
        end = 8 + struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8:end])
        change(header)
        (folder / WEIGHTS_FILE).write_bytes(with_header(json.dumps(header).encode(), raw[end:]))

    return edit


def instead(name: str, make: Callable[[Path], object]) -> Spoil:
    """Something else in place of a file."""

    def replace(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return replace


def link(name: str, target: str) -> Spoil:
    return instead(name, lambda place: place.symlink_to(target))


def write(name: str, contents: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(contents)


def cut(name: str, size: int) -> Spoil:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def lengthen(folder: Path) -> None:
    with (folder / WEIGHTS_FILE).open("ab") as file:
        file.write(b"x")


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    torch.save({"a": torch.ones(1)}, folder / "adapter_model.bin")


def factors_for(name: str, shape: tuple[int, int, int, int]) -> Spoil:
    """Replace the adapter by one for a single module."""
    return lambda folder: write_adapter(folder, random_factors({name: shape}, 1, 7, 0.1), base_model="builtin")


Q1 = module(1, "q")
KEY = f"base_model.model.{Q1}."
LEFT, RIGHT, SIGMA = (f"{KEY}soka_{part}" for part in ("left", "right", "sigma"))


def replace(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """Replace one tensor; the file stays well formed."""
    return edit_weights(lambda t: t.update({key: change(t[key]).contiguous()}))


def poke(key: str, value: float) -> Spoil:
    """Set the last value of a tensor."""
    return edit_weights(lambda t: t[key].view(-1)[-1:].fill_(value))


def set_spec(**values: Any) -> Spoil:
    """Change what the config says of one module."""
    return edit_config(lambda c: c["soka_modules"][Q1].update(values))


SOKA_FILES: Kinds = {
    "truncated data": (cut(WEIGHTS_FILE, -100), "truncated"),
    "truncated in the header": (cut(WEIGHTS_FILE, 100), "truncated"),
    "an empty file": (cut(WEIGHTS_FILE, 0), "truncated"),
    "weights are a device": (link(WEIGHTS_FILE, "/dev/zero"), "device"),
    "weights are a pipe": (instead(WEIGHTS_FILE, os.mkfifo), "pipe"),
    "more data than the header says": (lengthen, "longer than its header says"),
    "huge header length": (write(WEIGHTS_FILE, b"\xff" * 64), "its header would take"),
    "header is no JSON": (write(WEIGHTS_FILE, with_header(b'{"a": ')), "malformed header"),
    "header is no UTF-8": (write(WEIGHTS_FILE, with_header(b'{"\xff": 1}')), "malformed header"),
    "header is a list": (write(WEIGHTS_FILE, with_header(b"[1, 2]")), "expected an object"),
    "header nested deeply": (write(WEIGHTS_FILE, with_header(b"[" * 200_000)), "malformed header"),
    "a name twice in the header": (
        write(WEIGHTS_FILE, with_header(b'{"w": {}, "w": {}}')),
        "names that occur twice: w",
    ),
    "header without tensors": (write(WEIGHTS_FILE, with_header(b"{}")), f"missing {LEFT}"),
    "a tensor that is no object": (edit_header(lambda h: h.update({LEFT: 3})), LEFT),
    "offsets overlap": (
        edit_header(lambda h: h[RIGHT].update(data_offsets=h[LEFT]["data_offsets"], shape=h[LEFT]["shape"])),
        "a gap or an overlap",
    ),
    "offsets beyond the file": (
        edit_header(lambda h: h[SIGMA].update(data_offsets=[x + 10**9 for x in h[SIGMA]["data_offsets"]])),
        "a gap or an overlap",
    ),
    "offsets negative": (edit_header(lambda h: h[SIGMA].update(data_offsets=[-4, 0])), SIGMA),
    "offsets that do not fit the shape": (edit_header(lambda h: h[LEFT].update(shape=[1, 1, 1])), LEFT),
    "huge declared shape": (edit_header(lambda h: h[LEFT].update(shape=[1 << 40, 1 << 40, 1 << 40])), LEFT),
    "huge shape and offsets": (
        edit_header(lambda h: h.update({"z": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})),
        WEIGHTS_FILE,
    ),
    "unknown dtype": (edit_header(lambda h: h[LEFT].update(dtype="F3")), "dtype 'F3'"),
    "integers": (replace(LEFT, lambda t: t.to(torch.int32)), f"{LEFT} is I32"),
    "8-bit floats": (replace(RIGHT, lambda t: t.to(torch.float8_e4m3fn)), f"{RIGHT} is F8_E4M3"),
    "a git-lfs pointer": (write(WEIGHTS_FILE, b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs pointer"),
    "no weights": (remove(WEIGHTS_FILE), WEIGHTS_FILE),
    "weights in a pickle only": (pickle_only, "adapter_model.bin"),
    "a pickle beside": (write("more.pt", b"x"), "more.pt"),
    "weights are a directory": (instead(WEIGHTS_FILE, Path.mkdir), WEIGHTS_FILE),
    "weights link to themselves": (link(WEIGHTS_FILE, WEIGHTS_FILE), WEIGHTS_FILE),
}

SOKA_TENSORS: Kinds = {
    "not a number": (poke(LEFT, float("nan")), "not finite"),
    "infinite": (poke(SIGMA, float("inf")), "not finite"),
    "infinite in the served dtype": (replace(SIGMA, lambda t: t.double() * 1e300), "not finite"),
    "no left": (edit_weights(lambda t: t.pop(LEFT)), f"missing {LEFT}"),
    "no right": (edit_weights(lambda t: t.pop(RIGHT)), f"missing {RIGHT}"),
    "no sigma": (edit_weights(lambda t: t.pop(SIGMA)), f"missing {SIGMA}"),
    "a tensor too many": (edit_weights(lambda t: t.update({KEY + "lora_A": torch.ones(2, 2)})), KEY + "lora_A"),
    "a tensor of another module": (
        edit_weights(lambda t: t.update({"model.norm.weight": torch.ones(2)})),
        "model.norm.weight",
    ),
    "a tensor without values": (replace(LEFT, lambda t: t[:0]), "soka_left"),
    "left the wrong way round": (replace(LEFT, lambda t: t.permute(1, 2, 0)), "soka_left"),
    "sigma without a dimension": (replace(SIGMA, lambda t: t.sum()), "soka_sigma"),
    "left and right of different ranks": (replace(RIGHT, lambda t: t[:2]), "soka_right"),
}

SOKA_CONFIG: Kinds = {
    "config is no JSON": (write(CONFIG_FILE, b"{"), CONFIG_FILE),
    "config is empty": (write(CONFIG_FILE, b""), CONFIG_FILE),
    "config is no UTF-8": (write(CONFIG_FILE, b'{"peft_type": "\xff"}'), CONFIG_FILE),
    "config is a device": (link(CONFIG_FILE, "/dev/zero"), "device"),
    "config is a pipe": (instead(CONFIG_FILE, os.mkfifo), "pipe"),
    "config is a list": (write(CONFIG_FILE, b"[]"), CONFIG_FILE),
    "config is null": (write(CONFIG_FILE, b"null"), CONFIG_FILE),
    "config nested deeply": (write(CONFIG_FILE, b"[" * 200_000), CONFIG_FILE),
    "config with an endless number": (write(CONFIG_FILE, b'{"r": ' + b"9" * 10_000 + b"}"), CONFIG_FILE),
    "config is a directory": (instead(CONFIG_FILE, Path.mkdir), CONFIG_FILE),
    "config links to itself": (link(CONFIG_FILE, CONFIG_FILE), CONFIG_FILE),
    "no peft_type": (edit_config(lambda c: c.pop("peft_type")), "no peft_type"),
    "another peft_type": (
        edit_config(lambda c: c.update(peft_type="LOHA")),
        "peft_type is 'LOHA'; supported are LORA, SOKA, LOKR",
    ),
    "peft_type is a number": (set_config(peft_type=7), "peft_type is"),
    "peft_type of the other format": (set_config(peft_type="LOKR"), WEIGHTS_FILE),
    "format of the future": (set_config(soka_format=2), "this version reads 1"),
    "no format": (edit_config(lambda c: c.pop("soka_format")), "soka_format is None"),
    "an unknown setting": (set_config(soka_alpha=2), "soka_alpha"),
    "whole modules": (set_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "no modules": (set_config(soka_modules={}), "soka_modules must map"),
    "modules in a list": (set_config(soka_modules=[Q1]), "soka_modules must map"),
    "rank of the config": (set_spec(rank=9), "makes it"),
    "rank 0": (set_spec(rank=0), "rank must be at least 1"),
    "rank below 0": (set_spec(rank=-1), "rank must be at least 1"),
    "rank is no integer": (set_spec(rank=1.5), "rank must be at least 1"),
    "giant rank": (set_spec(rank=10**30), "soka_left"),
    "giant shape": (set_spec(shape=[10**9, 10**9, 10**9, 10**9]), "soka_left"),
    "large shape": (set_spec(shape=[1 << 16, 1 << 16, 1 << 16, 1 << 16]), "soka_left"),
    "shape of three": (set_spec(shape=[1, 2, 3]), "shape must be [m, n, p, q]"),
    "shape with a zero": (set_spec(shape=[0, 8, 16, 16]), "shape must be [m, n, p, q]"),
}

SOKA_MODULES: Kinds = {
    "wrong shape": (factors_for(module(0, "k"), (16, 8, 8, 16)), "the served weight is (64, 128)"),
    "no such layer": (factors_for(module(9, "q"), (16, 8, 8, 16)), "no layer of the served model"),
    "lm_head": (factors_for("lm_head", (2, 8, 313, 16)), "lm_head: no layer of the served model"),
    "embeddings": (factors_for("model.embed_tokens", (2, 8, 313, 16)), "model.embed_tokens: no layer"),
    "a norm": (factors_for("model.norm", (8, 1, 16, 1)), "model.norm: no layer"),
    "without the prefix": (factors_for("layers.0.self_attn.q_proj", (16, 8, 8, 16)), f"close is {module(0, 'q')}"),
    "a packed layer": (factors_for("model.layers.0.self_attn.qkv_proj", (16, 8, 16, 16)), "no layer of the served"),
}

LOKR_DOWN = "base_model.model.model.layers.0.mlp.down_proj."
LOKR_Q = "base_model.model.model.layers.0.self_attn.q_proj."
LOKR: Kinds = {
    "LoKr truncated": (cut(WEIGHTS_FILE, -100), "truncated"),
    "LoKr without w1": (edit_weights(lambda t: t.pop(LOKR_DOWN + "lokr_w1_a")), "lokr_w1_a"),
    "LoKr with a Tucker core": (
        edit_weights(lambda t: t.update({LOKR_Q + "lokr_t2": torch.ones(2, 2)})),
        "unknown tensors lokr_t2",
    ),
    "LoKr for convolutions": (replace(LOKR_Q + "lokr_w2", lambda t: t[..., None, None]), "make no matrix"),
    "LoKr halves that do not fit": (replace(LOKR_DOWN + "lokr_w1_a", lambda t: t[:, :1]), "make no matrix"),
    "LoKr halves of a huge product": (
        edit_weights(
            lambda t: t.update(
                {LOKR_DOWN + "lokr_w2_a": torch.ones(10**6, 1), LOKR_DOWN + "lokr_w2_b": torch.ones(1, 10**6)}
            )
        ),
        "too large",
    ),
    "LoKr integers": (replace(LOKR_Q + "lokr_w2", lambda t: t.to(torch.int64)), "is I64"),
    "LoKr not finite": (poke(LOKR_Q + "lokr_w2", float("nan")), "not finite"),
    "LoKr of another shape": (replace(LOKR_Q + "lokr_w2", lambda t: t[:-1]), "the served weight is (128, 128)"),
    "LoKr rank 0": (set_config(r=0, rank_pattern={}), "gives r as 0"),
    "LoKr rank pattern is a list": (set_config(rank_pattern=["q_proj"]), CONFIG_FILE),
    "LoKr alpha is a text": (set_config(alpha="2"), "gives alpha as '2'"),
    "LoKr alpha is infinite": (set_config(alpha=float("inf")), "not finite"),
    "LoKr alpha is endless": (set_config(alpha=10**400), "too large"),
    "LoKr rank pattern is no pattern": (set_config(rank_pattern={"(": 2}), "missing )"),
    "LoKr with whole modules": (set_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "LoKr without tensors": (write(WEIGHTS_FILE, with_header(b"{}")), "no tensors"),
    "LoKr config is a list": (write(CONFIG_FILE, b"[]"), CONFIG_FILE),
}

LORA_X = "base_model.model.model.layers.0.self_attn.x_proj.lora_A.weight"
LORA: Kinds = {
    "LoRA truncated": (cut(WEIGHTS_FILE, -100), "truncated: expected"),
    # Refused by vLLM, in its words.
    "LoRA rank above the limit": (set_config(r=4096), "rank"),
    "LoRA for other modules": (
        edit_weights(lambda t: t.update({LORA_X: torch.ones(4, 128)})),
        "x_proj",
    ),
    "LoRA without weights": (remove(WEIGHTS_FILE), "doesn't contain tensors"),
    "LoRA config without r": (edit_config(lambda c: c.pop("r")), "'r'"),
}

BY_START = {"beta": SOKA_FILES | SOKA_TENSORS | SOKA_CONFIG | SOKA_MODULES, "lokr": LOKR, "lora": LORA}
MALFORMED = {kind: (start, *how) for start, kinds in BY_START.items() for kind, how in kinds.items()}
# Small on the disk, and large or slow when read; with those that are served in the end, where the reason is empty.
HOSTILE_BY_START = {
    "beta": hostile.WEIGHTS | hostile.CONFIG | hostile.LOCK | hostile.SOKA,
    "lokr": hostile.LOKR,
    "lora": hostile.LORA | {f"LoRA: {kind}": how for kind, how in (hostile.WEIGHTS | hostile.CONFIG).items()},
}
HOSTILE = {kind: (start, *how) for start, kinds in HOSTILE_BY_START.items() for kind, how in kinds.items()}
