"""`[output] measure`: intruder dimensions and spectra of a build, in measured.json and in the report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import soka_serve
from soka_serve.adapter.inspect import inspect
from soka_serve.base.model import load_base
from soka_serve.builtin import base_directory
from soka_serve.compiler.artefact import first_batches
from soka_serve.compiler.context import prepare
from soka_serve.compiler.measures import MEASURES
from soka_serve.compiler.measures.spectra import describe, hidden_states, unit_rows
from soka_serve.compiler.report.page import render_report
from soka_serve.compiler.stages import encode
from soka_serve.io.workspace import Workspace
from soka_serve.manifest.read import read_manifest
from soka_serve.manifest.schema import Output
from tests.support.kron_oracle import draw
from tests.support.reports import report_data, spectra

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
MANIFEST = f"""\
schema = 1
name = "looked-at"
base = {{ builtin = "tiny" }}
eval = {{ limit = 0 }}
adapt = [{{ modules = ["{QUERY}", "{DOWN}"], init = "random", scale = 30.0 }}]
train = {{ steps = 2, batch_size = 3, data = {{ builtin = "math", limit = 8 }} }}
output = {{ write = ["adapter"], measure = ["intruders", "spectra"] }}
"""


def direct(matrix: Tensor) -> tuple[float, float]:
    """Effective rank and nuclear norm by the definition, of singular values from an SVD in float64."""
    sigma = torch.linalg.svdvals(matrix.double())
    shares = [float(s) for s in sigma / sigma.sum() if s > 0]
    return math.exp(-math.fsum(p * math.log(p) for p in shares)), float(sigma.sum())


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4)])
def test_effective_rank_and_nuclear_norm(shape: tuple[int, int]) -> None:
    found = describe(draw(*shape).float())
    assert (found["effective_rank"], found["nuclear_norm"]) == pytest.approx(direct(draw(*shape).float()), rel=1e-6)
    assert describe(torch.zeros(shape)) == {"effective_rank": 0.0, "nuclear_norm": 0.0}


def test_hidden_states_are_centred_rows_of_norm_one() -> None:
    rows = unit_rows(draw(6, 4) + 10)
    assert rows.norm(dim=1).tolist() == pytest.approx([1.0] * 6)
    assert torch.allclose(unit_rows(draw(6, 4) * 7 - 3), unit_rows(draw(6, 4)))


def test_the_schema_names_the_measures() -> None:
    names = get_args(get_args(Output.model_fields["measure"].annotation)[0])
    assert names == tuple(MEASURES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measures")
    (folder / "m.toml").write_text(MANIFEST)
    soka_serve.build(folder / "m.toml", out=folder, progress=False)
    return folder


def test_a_build_measures(made: Path) -> None:
    build = made / "looked-at"
    measured: dict[str, Any] = json.loads((build / "measured.json").read_text())
    assert [(row["module"], row["layer"]) for row in measured["intruders"]] == [(QUERY, 0), (DOWN, 1)]
    counted = inspect(build, base="tiny").parts[0].intruders
    assert counted == {row["module"]: row["count"] for row in measured["intruders"]}
    found = measured["spectra"]
    loaded = read_manifest(made / "m.toml")
    context = prepare(loaded, Workspace(made, "looked-at"), save_hashes=False)
    batches = first_batches(context, encode(context)[0], 4, torch.device("cpu"))
    assert found["batches"] == len(batches) == 3
    model = load_base(base_directory(), "float32").eval()
    states = hidden_states(model, batches)
    assert found["tokens"] == sum(int(batch["attention_mask"].sum()) for batch in batches)
    for layer, said in zip(states, found["hidden"]["base"], strict=True):
        rank, norm = direct(unit_rows(layer))
        assert said["effective_rank"] == pytest.approx(rank, rel=1e-3)
        assert said["nuclear_norm"] == pytest.approx(norm / math.sqrt(found["tokens"]), rel=1e-3)
    assert found["hidden"]["adapted"][0] == found["hidden"]["base"][0]  # the embedding's
    assert found["hidden"]["adapted"][-1] != found["hidden"]["base"][-1]
    trained = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    loss = sum(model(**b).loss * n for b, n in zip(batches, trained, strict=True)) / sum(trained)
    for row in found["gradients"]:
        (gradient,) = torch.autograd.grad(loss, model.get_submodule(row["module"]).weight, retain_graph=True)
        rank, norm = direct(gradient)
        assert row["effective_rank"] == pytest.approx(rank, rel=1e-2)
        assert row["nuclear_norm"] == pytest.approx(norm, rel=1e-2)


def test_what_was_measured_is_kept(made: Path) -> None:
    manifest = made / "m.toml"
    before = (made / "looked-at" / "measured.json").read_bytes()
    assert soka_serve.build(manifest, out=made, progress=False).ran == ()
    manifest.write_text("# a comment\n" + MANIFEST)
    assert soka_serve.build(manifest, out=made, progress=False).ran == ("report",)
    assert (made / "looked-at" / "measured.json").read_bytes() == before
    text = (made / "looked-at" / "report.html").read_text()
    assert 'id="measured"' in text
    assert "First gradients: effective rank" in text


def test_the_report_tells_it() -> None:
    data = report_data(spectra(3))
    assert 'id="measured"' not in render_report(data)
    rows = [{"module": f"model.layers.{n}.q_proj", "layer": n, "count": 2 * (n == 1)} for n in range(3)]
    text = render_report(replace(data, measured={"intruders": rows}))
    assert "Intruder dimensions: 2 in 1 of 3 modules" in text
    assert "q_proj, layer 1: 2" in text
    none = [row | {"count": 0} for row in rows]
    assert "Intruder dimensions: 0 in 0 of 3 modules" in render_report(replace(data, measured={"intruders": none}))
