"""Factors read in stacks are those read one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from soka_serve.adapter.format import look_at_adapter, write_adapter
from soka_serve.adapter.raw import read_raw
from soka_serve.adapter.stacks import find_stacks
from soka_serve.io.budget import ReadingBudget
from soka_serve.kron import Factors


def make(rank: int, *shape: int) -> Factors:
    m, n, p, q = shape
    return Factors(torch.randn(rank, m, n), torch.randn(rank, p, q), torch.rand(rank) + 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_stacks_hold_what_the_file_holds(tmp_path: Path, dtype: torch.dtype) -> None:
    """Modules of one shape at equal distances, at unequal ones, and alone."""
    torch.manual_seed(0)
    factors = {f"layers.{i}.q": make(2, 3, 4, 5, 6) for i in range(12)}
    factors |= {f"layers.{i}.k": make(1 + i % 2, 3, 2, 5, 12) for i in range(12)} | {"head": make(3, 7, 1, 1, 2)}
    write_adapter(tmp_path, factors, base_model="b", dtype=dtype)
    files = look_at_adapter(tmp_path)
    stacks = find_stacks(files)
    assert stacks is not None
    assert sorted(len(stack.names) for stack in stacks.stacks) == [1, 6, 6, 12]
    values = stacks.read(tmp_path)
    read = files.read().factors
    for stack in stacks.stacks:
        for name, left, right, sigma in zip(stack.names, *stack.factors(values), strict=True):
            for found, part in zip((left, right, sigma), ("left", "right", "sigma"), strict=True):
                assert torch.equal(found.float(), getattr(read[name], part)), (name, part)
    assert {name: tensor.shape for name, tensor in stacks.tensors(values)} == {
        name: info.shape for name, info in files.tensors.items()
    }


def test_the_layout_is_that_of_config_and_header_and_not_of_values(tmp_path: Path) -> None:
    layouts = []
    for seed, rank in ((0, 1), (1, 1), (0, 2)):
        torch.manual_seed(seed)
        folder = tmp_path / f"{seed} {rank}"
        write_adapter(folder, {"q": make(rank, 2, 2, 3, 3)}, base_model="b")
        layouts.append(read_raw(folder, ReadingBudget()).layout)
    assert layouts[0] == layouts[1] != layouts[2]
    assert layouts[0] is not None
    (tmp_path / "0 1" / "more.pt").write_bytes(b"x")
    raw = read_raw(tmp_path / "0 1", ReadingBudget())
    assert raw.layout is None
    assert "more.pt" in raw.problems[0]
