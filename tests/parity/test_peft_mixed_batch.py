"""PEFT's `adapter_names`: each row of a batch with its own adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from soka_serve.peft import soka_layers
from tests.support.peft_models import (
    close,
    logits,
    oracle_logits,
    saved,
    tiny_llama,
    tokens,
    two_adapters,
)


@pytest.fixture(scope="module")
def two() -> PeftModel:
    return two_adapters()


ROWS = ["default", "__base__", "other", "default", "other"]


def test_each_row_of_a_batch_has_its_adapter(two: PeftModel, tmp_path: Path) -> None:
    ids = tokens(rows=5)
    mixed = two(input_ids=ids, adapter_names=ROWS).logits
    folders = {name: saved(two, tmp_path / name, name) for name in ("default", "other")}
    base = logits(tiny_llama(), ids)
    for row, name in enumerate(ROWS):
        one = ids[row : row + 1]
        oracle = oracle_logits(tiny_llama(), folders.get(name, {}), one)
        assert close(mixed[row : row + 1], oracle), row
        assert close(mixed[row : row + 1], base[row : row + 1]) == (name == "__base__"), row
    assert two.active_adapters == ["default"]
    assert close(two(input_ids=ids).logits, oracle_logits(tiny_llama(), folders["default"], ids)), "no hook is left"


def test_mixed_batches_are_differentiable(two: PeftModel) -> None:
    ids = tokens(rows=2)
    two.set_adapter("default")
    two(input_ids=ids, adapter_names=["default", "__base__"]).logits.sum().backward()
    for layer in soka_layers(two).values():
        assert layer.soka_sigma["default"].grad is not None
    two.zero_grad()


def test_mixed_batches_generate_with_beams(two: PeftModel) -> None:
    ids = tokens(rows=3, length=4)
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    rows = ["other", "__base__", "default"]
    mixed = two.generate(input_ids=ids, adapter_names=rows, **options)
    for row, name in enumerate(rows):
        if name == "__base__":
            with two.disable_adapter():
                want = two.generate(input_ids=ids[row : row + 1], **options)
        else:
            two.set_adapter(name)
            want = two.generate(input_ids=ids[row : row + 1], **options)
        assert torch.equal(mixed[row, : want.shape[1]], want[0]), name
    two.set_adapter("default")


def test_mixed_batches_are_checked(two: PeftModel) -> None:
    ids = tokens(rows=2)
    with pytest.raises(ValueError, match=r"non-existing adapter.*defualt"):
        two(input_ids=ids, adapter_names=["defualt", "__base__"])
    with pytest.raises(ValueError, match=r"Length of `adapter_names` should be the same.*3 and 2"):
        two(input_ids=ids, adapter_names=["default"] * 3)
    with pytest.raises(TypeError, match="expected a list"):
        two(input_ids=ids, adapter_names="default")
    merged = copy.deepcopy(two)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        merged(input_ids=ids, adapter_names=["default", "__base__"])
    training = copy.deepcopy(two).train()
    with pytest.raises(ValueError, match="in training mode"):
        training(input_ids=ids, adapter_names=["default", "__base__"])
    with two.disable_adapter():
        assert torch.equal(two(input_ids=ids, adapter_names=["default", "other"]).logits, logits(tiny_llama(), ids))
