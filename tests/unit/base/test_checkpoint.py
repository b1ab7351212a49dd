"""Checkpoints: headers, shards, indexes, and everything that can be wrong with them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.optional_tensors import ties_embeddings
from soka_serve.errors import CheckpointError
from soka_serve.io.files import sha256_file
from soka_serve.io.safetensors import (
    all_finite,
    check_finite,
    find_not_finite,
    read_header,
    read_metadata,
    read_tensor,
    read_tensors,
)

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.linspace(-1, 1, 6).reshape(2, 3).bfloat16(),
    "c": torch.tensor([1, 2, 3]),
    "d": torch.tensor(2.5, dtype=torch.float16),
    "e": torch.zeros(0, 4),
    "f": torch.tensor([True, False]),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    directory = tmp_path / "single"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "sharded"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    weight_map = {}
    for i, names in enumerate((["a.weight", "c"], ["b.weight", "d", "e", "f"])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({n: TENSORS[n] for n in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def write_raw(file: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def edit_index(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_every_tensor_is_read(kind: str, request: pytest.FixtureRequest) -> None:
    checkpoint = Checkpoint.open(request.getfixturevalue(kind))
    assert set(checkpoint.tensors) == set(TENSORS)
    assert checkpoint.config == {"model_type": "llama"}
    for name, tensor in TENSORS.items():
        got = checkpoint.read(name)
        assert got.dtype == tensor.dtype
        assert got.shape == tensor.shape == checkpoint.info(name).shape
        assert torch.equal(got, tensor)
    info = checkpoint.info("a.weight")
    assert (info.dtype, info.nbytes, info.numel, info.torch_dtype) == ("F32", 48, 12, torch.float32)
    assert torch.equal(read_tensor(info, slice(1, 3)), TENSORS["a.weight"][1:3])
    assert read_tensor(info, slice(3, 9)).shape == (0, 4)
    with pytest.raises(CheckpointError, match=r"no tensor nothing\.weight"):
        checkpoint.read("nothing.weight")


def test_many_tensors_in_one_read(single: Path, tmp_path: Path) -> None:
    for names in (TENSORS, ["b.weight"], ["e"], []):
        header = read_header(single / "model.safetensors")
        found = read_tensors({name: header[name] for name in names})
        assert list(found) == list(names)
        for name, tensor in found.items():
            assert tensor.dtype == TENSORS[name].dtype
            assert torch.equal(tensor, TENSORS[name])
        floats = {name: header[name] for name in names if TENSORS[name].is_floating_point()}
        for name, tensor in read_tensors(floats, torch.float64).items():
            assert tensor.dtype == torch.float64
            assert torch.equal(tensor, TENSORS[name].double())
    same = {"b": torch.randn(2, 3), "a": torch.randn(4), "none": torch.zeros(0, 2), "one": torch.tensor(2.0)}
    save_file(same, tmp_path / "same.safetensors")  # all of one dtype: one after the other
    header = read_header(tmp_path / "same.safetensors")
    for wanted in (list(same), ["b", "one"], ["a"]):
        for dtype in (None, torch.float32, torch.bfloat16):
            found = read_tensors({name: header[name] for name in wanted}, dtype)
            assert list(found) == wanted
            assert all(torch.equal(tensor, same[name].to(dtype or torch.float32)) for name, tensor in found.items())
    # A narrow tensor before a wide one, as no library writes them: the wide one begins in the middle of its unit.
    raw = write_raw(
        tmp_path / "odd.safetensors",
        {
            "half": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
            "single": {"dtype": "F32", "shape": [2], "data_offsets": [2, 10]},
        },
        struct.pack("<eff", 0.5, 1.5, -2.5),
    )
    odd = read_tensors(read_header(raw))
    assert (odd["half"].tolist(), odd["single"].tolist()) == ([0.5], [1.5, -2.5])
    header = read_header(raw)
    raw.write_bytes(raw.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: tensors: truncated: expected 10 bytes, found 9"):
        read_tensors(header)


def test_values_that_are_not_finite_are_found() -> None:
    good, bad = torch.ones(2, 2), torch.tensor([1.0, torch.nan])
    assert find_not_finite({}) == find_not_finite({"a": good, "b": good.half()}) == []
    assert find_not_finite({"a": good, "b": bad, "c": good.bfloat16(), "d": -bad / 0}) == ["b", "d"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_all_finite(dtype: torch.dtype, value: float) -> None:
    values = torch.full((3, 1000), torch.finfo(dtype).max, dtype=dtype)  # their sum overflows
    assert all_finite(values)
    assert all_finite(torch.zeros(0, dtype=dtype))
    values[1, 17] = value
    assert not all_finite(values)
    values[2, 3] = -value
    assert not all_finite(values)


def test_metadata(single: Path) -> None:
    assert read_metadata(single / "model.safetensors") == {"format": "pt"}


def _sha256(files: Iterable[Path]) -> str:
    lines = sorted(f"{sha256_file(file)}  {file.name}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_hash_follows_the_weights_only(single: Path, sharded: Path) -> None:
    before = Checkpoint.open(single).sha256()
    assert before == _sha256([single / "model.safetensors"])
    assert Checkpoint.open(sharded).sha256(lambda f: sha256_file(f)) == _sha256(sharded.glob("*.safetensors"))
    (single / "config.json").write_text("{}")
    assert Checkpoint.open(single).sha256() == before
    assert Checkpoint.open(sharded).sha256() != before
    save_file(TENSORS | {"c": torch.tensor([1, 2, 4])}, single / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint.open(single).sha256() != before


@pytest.mark.parametrize("cut", [0, 5, 8, 60, -1])
def test_truncated(single: Path, cut: int) -> None:
    file = single / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    size = len(whole[:cut])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: truncated: expected .*\d+ bytes.*, found {size}$"):
        read_header(file)
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(single)


def test_truncated_after_the_header_was_read(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[: checkpoint.info("a.weight").start + 3])
    with pytest.raises(CheckpointError, match=r"a\.weight: truncated: expected 48 bytes, found 3"):
        checkpoint.read("a.weight")


def test_longer_than_the_header_says(single: Path) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        read_header(file)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{nonsense", "malformed header"),
        (b"\xff\xfe{}", "malformed header"),
        (b"[]", "expected an object"),
        (b'{"a": 1, "a": 2}', "names that occur twice: a"),
        ({"a": 3}, "a: expected dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, "a: expected dtype"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "a: expected dtype"),
        ({"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}, "dtype 'F31' is not one of F64"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, r"F32 of shape \[3\] takes 12 bytes"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, "span -8"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "a gap or an overlap"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            },
            "b: begins at byte",
        ),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "truncated: expected .* bytes, found"),
    ],
)
def test_malformed_header(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(write_raw(tmp_path / "x.safetensors", header, bytes(8)))
    assert "x.safetensors" in caught.value.message
    assert caught.value.hint


def test_not_safetensors_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"PK\x03\x04 this is a zip file, surely")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(CheckpointError, match="git-lfs pointer") as caught:
        read_header(file)
    assert "git lfs pull" in str(caught.value.hint)


def test_every_problem_at_once(sharded: Path) -> None:
    (sharded / "config.json").write_text('{\n "model_type": }')
    for file in sorted(sharded.glob("*.safetensors")):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(sharded)
    lines = caught.value.message.splitlines()
    assert len(lines) == 3
    assert "config.json:2:16: not JSON" in lines[0]
    assert "00001-of-00002.safetensors: truncated" in lines[1]
    assert "00002-of-00002.safetensors: truncated" in lines[2]


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: missing, though .*index"):
        Checkpoint.open(sharded)


def test_index_names_what_a_shard_lacks(sharded: Path) -> None:
    names = [f"z.{number}" for number in range(12)]
    edit_index(sharded, lambda i: i["weight_map"].update(dict.fromkeys(names, "model-00001-of-00002.safetensors")))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(sharded)
    assert "names z.0 in model-00001-of-00002.safetensors, which does not hold it" in caught.value.message
    assert "and 2 more" in caught.value.message
    assert "weight_map" in str(caught.value.hint)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "language_model.lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "embeddings.position_ids",
        "transformer.h.0.attn.bias",
        "gpt_neox.layers.0.attention.masked_bias",
    ],
)
def test_index_names_what_the_model_does_without(sharded: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    (sharded / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    edit_index(sharded, lambda i: i["weight_map"].update({name: "model-00001-of-00002.safetensors"}))
    with caplog.at_level(logging.INFO):
        assert set(Checkpoint.open(sharded).tensors) == set(TENSORS)
    assert f"names {name}, which no file holds and the model does not need" in caplog.text
    assert "WARNING" not in caplog.text


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"model_type": "gemma", "tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"model_type": "gemma"}, True),  # their config classes' own defaults
        ({"model_type": "llama"}, False),
        ({"model_type": "gemma", "tie_word_embeddings": None}, True),
        ({"model_type": "of another age"}, False),
        ({"model_type": ["llama"]}, False),
        ({}, False),
    ],
    ids=str,
)
def test_whether_a_model_needs_its_head(sharded: Path, config: dict[str, Any], tied: bool) -> None:
    (sharded / "config.json").write_text(json.dumps(config))
    edit_index(sharded, lambda i: i["weight_map"].update({"lm_head.weight": "model-00001-of-00002.safetensors"}))
    if tied:
        Checkpoint.open(sharded)
        return
    with pytest.raises(CheckpointError, match=r"names lm_head\.weight in .*, which does not hold it"):
        Checkpoint.open(sharded)


def test_defaults_of_tying_are_those_of_transformers() -> None:
    for kind in ("llama", "gemma", "gemma3_text", "qwen2", "qwen3", "mistral", "phi3", "cohere2", "gpt2", "gpt_neox"):
        tied = bool(getattr(AutoConfig.for_model(kind), "tie_word_embeddings", False))
        assert ties_embeddings({"model_type": kind}) == tied, kind


def test_index_names_the_wrong_shard(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers and vLLM read every tensor of every file that the index names."""
    edit_index(sharded, lambda i: i["weight_map"].update({"c": "model-00002-of-00002.safetensors"}))
    checkpoint = Checkpoint.open(sharded)
    assert torch.equal(checkpoint.read("c"), TENSORS["c"])
    assert "names model-00002-of-00002.safetensors for c, which is in model-00001" in caplog.text


def test_index_leads_out_of_the_directory(sharded: Path) -> None:
    edit_index(sharded, lambda i: i["weight_map"].update({"c": "../single/model.safetensors"}))
    with pytest.raises(CheckpointError, match="expected the name of a file beside the index"):
        Checkpoint.open(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    file = sharded / "model-00002-of-00002.safetensors"
    save_file({n: t for n, t in TENSORS.items() if n != "a.weight"}, file)
    with pytest.raises(CheckpointError, match=r"c is in both model-00001.* and model-00002"):
        Checkpoint.open(sharded)


def test_tensor_that_the_index_lacks(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_index(sharded, lambda i: i["weight_map"].pop("c"))
    with caplog.at_level(logging.WARNING):
        assert "c" in Checkpoint.open(sharded).tensors
    assert "1 tensors are not in the index, c for one" in caplog.text


def test_index_without_map(sharded: Path) -> None:
    edit_index(sharded, lambda i: i.pop("weight_map"))
    with pytest.raises(CheckpointError, match="weight_map"):
        Checkpoint.open(sharded)


def test_pickles_are_refused(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickles \(pytorch_model\.bin\)") as caught:
        Checkpoint.open(single)
    assert "save_pretrained" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", None, r"config\.json: no such file"),
        ("config.json", "[1]", "expected a JSON object, got list"),
        ("config.json", "{'a': 1}", r"config\.json:1:2: not JSON"),
        ("model.safetensors", None, r"no weights: expected model\.safetensors or"),
    ],
)
def test_missing_or_malformed_parts(single: Path, file: str, text: str | None, message: str) -> None:
    (single / file).unlink()
    if text is not None:
        (single / file).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(single)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpoint.open(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="not a directory"):
        Checkpoint.open(tmp_path / "file")


def test_not_finite() -> None:
    tensor = torch.zeros(4, 5, dtype=torch.bfloat16)
    assert check_finite(tensor, "w") is tensor
    big = torch.full((4, 5), 3e38)  # the sum overflows, the values do not
    assert check_finite(big, "w") is big
    tensor[1, 2], tensor[3, 3] = float("nan"), float("-inf")
    with pytest.raises(CheckpointError, match=r"layer\.weight: 2 of 20 values are NaN or infinite"):
        check_finite(tensor, "layer.weight")
