"""Weight decay that would step past what it pulls factors to: refused by plan and build, by the optimiser's rates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import soka_serve
from soka_serve.base.modules import Module
from soka_serve.base.target_modules import TargetModule
from soka_serve.compiler.plan.decay import check_decay
from soka_serve.errors import PlanError
from soka_serve.kron.factors import random_terms
from soka_serve.kron.shapes import balanced_shape
from soka_serve.manifest.rules import Adapt, RankFixed
from soka_serve.manifest.schema import SOKA_RATE, Manifest
from soka_serve.peft import build_soka_model
from soka_serve.peft.optimizer import learning_rates
from tests.support.peft_models import tiny_llama

MANIFEST = """\
schema = 1
name = "decay"
base = {{ builtin = "tiny" }}
adapt = [{{ modules = ["q_proj"]{rule} }}]
[train]
steps = 1
weight_decay = {decay}
data = {{ builtin = "math" }}
"""


def write(folder: Path, decay: float, rule: str = "") -> Path:
    file = folder / "decay.toml"
    file.write_text(MANIFEST.format(decay=decay, rule=rule))
    return file


def limit(folder: Path, rule: str = "") -> float:
    with pytest.raises(PlanError) as caught:
        soka_serve.plan(write(folder, 1e6, rule))
    assert re.search(r"decay\.toml:7:.*weight_decay", caught.value.message), caught.value.message
    found = re.search(r"at most ([\d.e+-]+)", str(caught.value.hint))
    assert found is not None
    return float(found[1])


def test_the_limit_is_where_a_step_goes_all_the_way(tmp_path: Path) -> None:
    most = limit(tmp_path)
    assert soka_serve.plan(write(tmp_path, 0.95 * most))
    with pytest.raises(PlanError, match=r"goes .* times the way back"):
        soka_serve.build(write(tmp_path, 1.1 * most), out=tmp_path / "build", progress=False)
    assert not list((tmp_path / "build").rglob("init-*"))
    # More terms move less each.
    assert limit(tmp_path, ', rank = { policy = "fixed", rank = 4 }') == pytest.approx(2 * most, rel=0.1)


def test_terms_that_mend_a_quantised_base_count_as_fast_as_they_may_move(tmp_path: Path) -> None:
    """How large they are beside the weight is not known yet; they move at most as fast as small ones."""
    file = write(tmp_path, 1e6, ', init = "quantisation"')
    file.write_text(file.read_text().replace('builtin = "tiny"', 'builtin = "tiny", quantize = "4bit"'))
    with pytest.raises(PlanError) as caught:
        soka_serve.plan(file)
    assert f"at most {limit(tmp_path):.2g} " in str(caught.value.hint)


def test_it_is_worked_out_from_the_rates_of_the_optimiser() -> None:
    """Those of as many modules of the same shapes."""
    model = tiny_llama()
    names = [name for name, _ in model.named_modules() if name.endswith("q_proj")]
    shapes = {name: balanced_shape(*model.get_submodule(name).weight.shape) for name in names}
    factors = {name: random_terms(2, shape, 1.0) for name, shape in shapes.items()}
    adapted = build_soka_model(model, factors, initial=True)
    largest = SOKA_RATE * max(learning_rates(adapted, {"left": 1.0, "right": 1.0, "sigma": 0.0}).values())
    rule = Adapt(modules=["q_proj"], rank=RankFixed(rank=2))
    targets = []
    for name, shape in shapes.items():
        size = (shape.out_features, shape.in_features)
        targets.append(TargetModule(Module(name, *size, 0, "float32"), rule, (0,), shape))

    def manifest(decay: float) -> Manifest:
        train = {"steps": 1, "data": {"builtin": "math"}, "weight_decay": decay}
        return Manifest.model_validate({"schema": 1, "base": {"builtin": "tiny"}, "train": train})

    with pytest.raises(PlanError, match=r"goes 1\.02 times"):
        check_decay(manifest(1.02 / largest), targets)
    check_decay(manifest(0.98 / largest), targets)
