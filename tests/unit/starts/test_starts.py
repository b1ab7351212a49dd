"""The registry of starts: manifests take its names, and what a row says holds for its rules."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from soka_serve.kron import Factors
from soka_serve.kron.shapes import FactorShape
from soka_serve.manifest.rules import DEFAULT_CALIBRATION_BATCHES, Adapt
from soka_serve.starts import ROWS, STARTS, Material, Start

SHAPE = FactorShape(2, 3, 4, 5)


class SomePool:
    """Terms that are told apart by their values."""

    module, shape, size, seed = "layer", SHAPE, 0.5, 3
    sigma = (4.0, 3.0, 2.0, 1.0)

    def terms(self, lefts: range, rights: range) -> Factors:
        generator = torch.Generator().manual_seed(0)
        left = torch.randn(4, SHAPE.m, SHAPE.n, generator=generator)
        right = torch.randn(4, SHAPE.p, SHAPE.q, generator=generator)
        return Factors(left[list(lefts)], right[list(rights)], torch.tensor(self.sigma)[list(lefts)])


def test_manifests_take_the_names_of_the_registry() -> None:
    assert Adapt.model_json_schema()["properties"]["init"]["enum"] == list(STARTS)
    with pytest.raises(ValidationError):
        Adapt(init="weight")


@pytest.mark.parametrize("start", ROWS.values(), ids=list(ROWS))
def test_a_row_says_what_its_rules_do(start: Start) -> None:
    """A start either subtracts its terms, or changes the model, or has one factor of zeros."""
    source = {start.source: "x"} if start.source else {}
    variant = next(
        ({"init": s.name, "components": start.name} for s in STARTS.values() if start in s.variants.values()), {}
    )
    rule = Adapt(**{"init": start.name, **source, **variant})
    assert (rule.start, rule.source) == (start, "x" if start.source else None)
    assert rule.batches == (DEFAULT_CALIBRATION_BATCHES if start.calibrated else 0)
    assert not (start.calibrated and start.unweighed)
    assert not (start.subtracted and start.changes)
    assert start.meaning
    assert start.told
    terms = start.factors(SomePool(), 2)
    assert terms.rank == 2
    if not start.subtracted and not start.changes:
        assert not terms.right.any()
    sizes = [terms.left.square().mean((1, 2)), *([terms.right.square().mean((1, 2))] if terms.right.any() else [])]
    assert torch.allclose(torch.stack(sizes), torch.ones(1), atol=1e-5)
    if not start.changes:
        assert float(terms.sigma.square().mean().sqrt()) == pytest.approx(SomePool.size)
    assert start.factors(SomePool(), 0).rank == 0


def test_the_delta_is_decomposed_in_float32() -> None:
    weight, tuned = torch.full((2, 2), 1.0, dtype=torch.bfloat16), torch.full((2, 2), 1.5, dtype=torch.bfloat16)
    found = STARTS["delta"].matrix(Material(weight, tuned))
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full((2, 2), 0.5))


def test_every_package_is_in_the_wheel(root: Path) -> None:
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent.relative_to(root) for file in (root / "soka_serve").rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in folders} <= set(listed)
