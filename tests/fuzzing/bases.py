"""Bases whose tensors, config and tokenizer do not agree: taken as the model has them, or refused."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import soka_serve.base.meta_model  # noqa: F401 - transformers is imported before the clock runs
from soka_serve.base.base import Base
from soka_serve.base.pretrained import open_tokenizer
from soka_serve.base.served_tokenizer import check_reading
from soka_serve.base.tokenizer import TextTokenizer
from soka_serve.base.tokenizer_class import reads_plainly
from soka_serve.builtin import base_directory
from soka_serve.data.examples import Example
from soka_serve.errors import SokaError, is_printable
from soka_serve.io.safetensors import read_header
from tests.fuzzing.limits import bounded, is_plain
from tests.fuzzing.spoil import JSON, NODES

_KINDS = ("llama", "qwen2", "qwen3", "granite", "phi3", "gemma3_text", "gpt2", "mixtral", "clip", "new")
_SIZES = ("num_hidden_layers", "hidden_size", "num_key_value_heads", "intermediate_size", "vocab_size", "head_dim")


def spoil_base(draw: st.DrawFn, folder: Path) -> None:
    """Tensors renamed, taken out, added and of other shapes; another architecture, other sizes."""
    file = folder / "model.safetensors"
    shapes = {name: list(info.shape) for name, info in read_header(file).items()}
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(shapes))) if shapes else "none"
        kind = draw(st.sampled_from(["drop", "shape", "extra layer", "mtp", "bare", "prefix", "rename"]))
        if kind == "drop":
            shapes.pop(name, None)
        elif kind == "shape":
            shapes[name] = draw(st.lists(st.integers(0, 9), max_size=3))
        elif kind == "extra layer":
            shapes[f"model.layers.{draw(st.integers(3, 10**6))}.self_attn.q_proj.weight"] = [8, 8]
        elif kind == "mtp":
            shapes[f"mtp.{name}"] = [8, 8]
        elif kind == "bare":
            shapes = {other.removeprefix("model."): shape for other, shape in shapes.items()}
        elif kind == "prefix":
            shapes = {f"{draw(st.sampled_from(['model', 'language_model', 'x']))}.{n}": s for n, s in shapes.items()}
        else:
            shapes[draw(st.text(max_size=8)) or "x"] = shapes.pop(name, [2])
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if draw(st.booleans()):
        config["model_type"] = draw(st.sampled_from(_KINDS))
    if draw(st.integers(0, 2)) == 0:
        config[draw(st.sampled_from(_SIZES))] = draw(st.sampled_from([None, 0, -1, 1, 3, 5, 8, "4", 2.5, [], True]))
    if draw(st.integers(0, 3)) == 0:
        config["text_config"] = draw(st.sampled_from([None, {}, [], 3, {"hidden_size": 8}, {"model_type": "llama"}]))
    (folder / "config.json").write_text(json.dumps(config))


def check_base(folder: Path) -> bool:
    """Every module that is listed has its weight in the file; returns whether the base was taken."""
    with bounded():
        refusal = ""
        try:
            opened = Base(folder)
            base, weights = opened.layout, opened.weights
        except SokaError as error:
            refusal = error.message
    assert all(map(is_printable, refusal.split("\n"))), refusal
    if refusal:
        return False
    for module in base.modules:
        assert weights.get(module.name).shape == (module.out_features, module.in_features)
    assert base.size.parameters > 0
    return True


# --- tokenizers -------------------------------------------------------------------------------------------------------


CHANGED = ("tokenizer_config.json", "tokenizer.json", "config.json", "special_tokens_map.json", "added_tokens.json")
_EXAMPLES = [
    Example("Question: Max has 30 pens.\nAnswer:", " 3\u0301 <|x|>"),
    Example("<s>a", " b</s>", templated=True),
]


def change(folder: Path, name: str, **values: Any) -> None:
    """Set keys of a JSON file, which is made if need be; None takes a key out."""
    file = folder / name
    before = json.loads(file.read_text()) if file.exists() else {}
    after = {key: value for key, value in {**before, **values}.items() if value is not None}
    file.write_text(json.dumps(after))


def _add_token(folder: Path, content: str, number: int, **options: Any) -> None:
    token = {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    token |= {"special": True, **options}
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    said = {str(t["id"]): {key: value for key, value in t.items() if key != "id"} for t in tokens}
    change(folder, "tokenizer_config.json", added_tokens_decoder={**said, str(number): token})


def _own_end(folder: Path) -> None:
    """tokenizer.json itself puts an EOS behind every text."""
    value = json.loads((folder / "tokenizer.json").read_text())
    processor = value["post_processor"]
    processor["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    processor["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    (folder / "tokenizer.json").write_text(json.dumps(value))


def _change_weights(folder: Path, tensors: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Add or replace tensors, where the weights are there too."""
    file = folder / "model.safetensors"
    if file.exists():
        weights = load_file(file)
        save_file({**weights, **tensors(weights)}, file, metadata={"format": "pt"})


def _room(folder: Path) -> None:
    """Embeddings for more tokens than tokenizer.json has, as padded vocabularies have them."""
    change(folder, "config.json", vocab_size=1024)
    name = "model.embed_tokens.weight"

    def enlarged(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        old = weights[name]
        return {name: torch.cat([old, old.new_zeros(1024 - len(old), old.shape[1])])}

    _change_weights(folder, enlarged)


def _qwen2(folder: Path) -> None:
    """The same model as a Qwen2, which has biases."""
    change(folder, "config.json", model_type="qwen2")
    ends = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    _change_weights(
        folder,
        lambda w: {n.removesuffix("weight") + "bias": v.new_zeros(len(v)) for n, v in w.items() if n.endswith(ends)},
    )


SETTINGS = "tokenizer_config.json"
KINDS: Mapping[str, Callable[[Path], object]] = {
    "class": lambda f: change(f, SETTINGS, tokenizer_class="LlamaTokenizerFast"),
    "class of the config": lambda f: (
        change(f, SETTINGS, tokenizer_class=None),
        change(f, "config.json", tokenizer_class="LlamaTokenizerFast"),
    ),
    "another class": lambda f: change(f, SETTINGS, tokenizer_class="GemmaTokenizer"),
    "model type": _qwen2,
    "no class": lambda f: (change(f, SETTINGS, tokenizer_class=None), _qwen2(f)),
    "no BOS": lambda f: change(f, SETTINGS, add_bos_token=False),
    "EOS behind": lambda f: change(f, SETTINGS, add_bos_token=True, add_eos_token=True),
    "EOS behind, by tokenizer.json": _own_end,
    "added token": lambda f: (_room(f), _add_token(f, " pens", 626, special=False)),
    "added_tokens.json": lambda f: (_room(f), change(f, "added_tokens.json", **{" pens": 626})),
    "extra special token": lambda f: (_room(f), change(f, SETTINGS, extra_special_tokens=[" pens"])),
    "EOS that is added": lambda f: (_room(f), change(f, SETTINGS, eos_token="<|end|>")),
    "EOS without embedding": lambda f: change(f, SETTINGS, eos_token="<|end|>"),
    "token without embedding": lambda f: _add_token(f, " pens", 626, special=False),
    "special_tokens_map": lambda f: change(f, "special_tokens_map.json", eos_token="<pad>", bos_token="</s>"),
    "special tokens cut up": lambda f: change(f, SETTINGS, split_special_tokens=True),
    "space in front": lambda f: change(f, SETTINGS, tokenizer_class="GPT2Tokenizer", add_prefix_space=True),
    "saved again": lambda f: open_tokenizer(f).save_pretrained(f),
    "versions of the file": lambda f: (
        shutil.copy(f / "tokenizer.json", f / "tokenizer.4.0.0.json"),
        change(f, SETTINGS, fast_tokenizer_files=["tokenizer.4.0.0.json"]),
    ),
}
"""Each changes the files of the embedded base; `plan` and a build read all that they make alike, or refuse it."""


def spoil_tokenizer(draw: st.DrawFn, folder: Path) -> None:
    """A copy of the embedded base's tokenizer in `folder`, with one to three changes."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_directory() / name, folder)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from([*KINDS, "key", "key", "key", "node"]))
        if kind == "node":
            file = folder / draw(st.sampled_from([*CHANGED, "tokenizer.model", "vocab.json", "merges.txt"]))
            file.unlink(missing_ok=True)
            NODES[draw(st.sampled_from(sorted(NODES)))](file)
            return
        if not all(is_plain(file) for file in folder.iterdir()):
            return
        if kind == "key":
            _set_a_key(draw, folder / draw(st.sampled_from(CHANGED)))
        else:
            try:
                KINDS[kind](folder)
            except (LookupError, TypeError, AttributeError, SokaError):  # of files that are spoilt already
                return


def _set_a_key(draw: st.DrawFn, file: Path) -> None:
    value = json.loads(file.read_text()) if file.exists() else {}
    table = value
    for _ in range(draw(st.integers(0, 2))):
        inner = [key for key in table if isinstance(table[key], dict) and table[key]]
        table = table[draw(st.sampled_from(sorted(inner)))] if inner else table
    names = ["tokenizer_file", "vocab_file", "tokenizer_object", "post_processor", "gguf_file", "backend", "merges"]
    keys = st.sampled_from([*names, "extra_special_tokens", "added_tokens_decoder", *sorted(table)[:40]])
    table[draw(keys)] = draw(JSON)
    file.write_text(json.dumps(value))


def check_tokenizer(folder: Path) -> bool:
    """Opening a tokenizer and reading text with it gives tokens, the same in plans, or a message, within the limits.

    Returns:
        Whether there are tokens.
    """
    with bounded():
        try:
            base = Base(folder)
            read = _readings(base.tokenizer)
        except SokaError:
            return False
        if reads_plainly(base.tokenizer_folder):
            assert _readings(TextTokenizer.from_folder(base.tokenizer_folder)) == read
        with suppress(SokaError):
            check_reading(base.tokenizer, _EXAMPLES, base.tokenizer_folder)
            return True
    return False


def _readings(tokenizer: TextTokenizer) -> tuple[object, ...]:
    pairs = tokenizer.encode_pairs([(e.prompt, e.completion) for e in _EXAMPLES])
    settings = replace(tokenizer.settings, reader="")
    return pairs, settings, tokenizer.stop_ids, tokenizer.pad_id
