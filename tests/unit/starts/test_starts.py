"""The registry of starts: manifests take its names, and what a row says holds for its rules."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from soka_serve.kron import Factors, dense_delta
from soka_serve.kron.factors import rearrange
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
        (
            {"init": s.name, key: start.name}
            for s in STARTS.values()
            for key in ("components", "right")
            if start in s.variants.values() and start.name in get_args(Adapt.model_fields[key].annotation)
        ),
        {},
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
        assert start.needs_trained in ("left", "right")
        assert not getattr(terms, start.needs_trained).any()
    sizes = [side.square().mean((1, 2)) for side in (terms.left, terms.right) if side.any()]
    assert sizes
    assert torch.allclose(torch.stack(sizes), torch.ones(1), atol=1e-5)
    if not start.changes:
        assert float(terms.sigma.square().mean().sqrt()) == pytest.approx(SomePool.size)
    assert start.factors(SomePool(), 0).rank == 0
    cut = start.cut(SomePool(), 2)
    assert (cut is not None) == start.cuts
    if cut is not None:
        assert not start.subtracted
        torch.testing.assert_close(dense_delta(cut), dense_delta(SomePool().terms(range(2), range(2))))


def test_cosine_atoms_that_align_best_with_the_gradient() -> None:
    """Against all atoms in float64, each built from its definition; they are an orthonormal basis."""
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(SHAPE.out_features, SHAPE.in_features, generator=generator)
    _, _, p, q = SHAPE

    def cosine(size: int, frequency: int) -> torch.Tensor:
        wave = torch.cos(torch.pi * frequency * (torch.arange(size).double() + 0.5) / size)
        return wave / wave.norm()

    atoms = torch.stack([torch.outer(cosine(p, u), cosine(q, v)).flatten() for u in range(p) for v in range(q)])
    torch.testing.assert_close(atoms @ atoms.t(), torch.eye(p * q).double())
    along = rearrange(gradient.double(), SHAPE) @ atoms.t()
    order = along.norm(dim=0).argsort(descending=True)
    found = ROWS["dct"].decompose(gradient, SHAPE, 5, seed=0)
    torch.testing.assert_close(found.factors.sigma.double(), along.norm(dim=0)[order[:5]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.factors.right.flatten(1).double(), atoms[order[:5]], rtol=1e-5, atol=1e-6)
    left = found.factors.left * found.factors.sigma[:, None, None]
    torch.testing.assert_close(left.flatten(1).double(), along[:, order[:5]].t(), rtol=1e-4, atol=1e-5)
    everything = ROWS["dct"].decompose(gradient, SHAPE, p * q, seed=0)
    assert float(everything.factors.sigma.square().sum()) == pytest.approx(everything.total_energy, rel=1e-5)
    torch.testing.assert_close(dense_delta(everything.factors), gradient, rtol=1e-4, atol=1e-5)


def test_the_delta_is_decomposed_in_float32() -> None:
    weight, tuned = torch.full((2, 2), 1.0, dtype=torch.bfloat16), torch.full((2, 2), 1.5, dtype=torch.bfloat16)
    found = STARTS["delta"].matrix(Material(weight, tuned))
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full((2, 2), 0.5))


def test_every_package_is_in_the_wheel(root: Path) -> None:
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent.relative_to(root) for file in (root / "soka_serve").rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in folders} <= set(listed)
