"""`init = "adapter"`: training goes on from a finished adapter, ours or PEFT's LoKr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import soka_serve
from soka_serve.adapter.format import read_adapter, write_adapter
from soka_serve.adapter.given import open_given
from soka_serve.adapter.remote import fetch
from soka_serve.adapter.remote.problems import FetchError
from soka_serve.base.base import Base
from soka_serve.base.target_modules import resolve_targets
from soka_serve.builtin import base_directory
from soka_serve.compiler.context import check_output, prepare
from soka_serve.compiler.init.initialise import InitRun
from soka_serve.compiler.plan.given import settle_targets
from soka_serve.compiler.plan.plan import make_plan
from soka_serve.errors import BuildError, CheckpointError, PlanError
from soka_serve.io.workspace import Workspace
from soka_serve.kron import Factors
from soka_serve.kron.shapes import FactorShape
from soka_serve.manifest.read import read_manifest
from soka_serve.manifest.schema import Manifest
from tests.support import kron_oracle as oracle
from tests.support.remote_stores import web_server

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
MANIFEST = """\
schema = 1
name = "further"
base = { builtin = "tiny" }
eval = { limit = 0 }
train = { steps = STEPS, batch_size = 2, data = { builtin = "math", limit = 8 } }
output = { write = ["adapter"], report = false, adapter_terms = "trained" }
[[adapt]]
modules = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
init = "adapter"
adapter = "first"
"""


def _shape(name: str, first: int, second: int) -> FactorShape:
    module = next(m for m in Base(base_directory()).layout.modules if m.name == name)
    return FactorShape(first, second, module.out_features // first, module.in_features // second)


def _terms() -> dict[str, Factors]:
    """Ranks and shapes that no rule would choose."""
    return {
        QUERY: oracle.draw_factors(_shape(QUERY, 2, 4), 3, scale=0.01).to(torch.float32),
        DOWN: oracle.draw_factors(_shape(DOWN, 4, 2), 1, seed=5, scale=0.02).to(torch.float32),
    }


def _write(folder: Path, steps: int = 0, text: str = MANIFEST, **options: Any) -> Path:
    write_adapter(folder / "first", _terms(), base_model="tiny", **options)
    file = folder / "further.toml"
    file.write_text(text.replace("STEPS", str(steps)))
    return file


def _deltas(adapter: Path) -> dict[str, Tensor]:
    read = read_adapter(adapter)
    return {name: oracle.oracle_delta(read.delta_factors(name)) for name in read.factors}


def _close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_no_step_gives_the_adapter_back_and_a_step_changes_it(tmp_path: Path) -> None:
    built = {}
    for steps in (0, 2):
        manifest = _write(tmp_path, steps)
        result = soka_serve.build(manifest, out=tmp_path / f"build-{steps}", progress=False)
        assert result.adapter is not None
        built[steps] = _deltas(result.adapter)
        assert {name: f.rank for name, f in read_adapter(result.adapter).factors.items()} == {QUERY: 3, DOWN: 1}
    first = {name: oracle.oracle_delta(factors) for name, factors in _terms().items()}
    assert built[0].keys() == first.keys()
    for name, delta in first.items():
        _close(built[0][name], delta)
        assert 1e-5 < float((built[2][name] - delta).norm() / delta.norm()) < 1


def test_lokr_is_what_peft_makes_of_it(tmp_path: Path) -> None:
    from peft import LoKrConfig, get_peft_model

    from soka_serve.base.model import load_base

    torch.manual_seed(0)
    config = LoKrConfig(r=2, alpha=3, target_modules=[QUERY, DOWN], init_weights=False, alpha_pattern={DOWN: 5})
    model = get_peft_model(load_base(base_directory(), "float32"), config)
    model.save_pretrained(tmp_path / "lokr")
    manifest = Manifest.model_validate(
        {
            "schema": 1,
            "base": {"builtin": "tiny"},
            "adapt": [{"modules": [QUERY, DOWN], "init": "adapter", "adapter": "lokr"}],
            "train": {"steps": 1, "data": {"builtin": "math"}},
        }
    )
    base = Base(base_directory())
    targets, adapters = settle_targets(resolve_targets(manifest, base.layout.modules), manifest, tmp_path)
    (tmp_path / "scratch").mkdir()
    terms = {source: adapter.read() for source, adapter in adapters.items()}
    started = InitRun(targets, base, tmp_path / "scratch", adapters=terms, progress=False).initialise()
    assert not started.initial_modules
    for module in started.modules:
        expected = model.get_submodule(f"base_model.model.{module.module}").get_delta_weight("default").detach()
        factors = started.factors[module.module]
        _close(oracle.oracle_delta(factors), expected.double())
        assert module.rank == 1
        assert module.total_energy == pytest.approx(float(expected.double().square().sum()), rel=1e-5)
        torch.testing.assert_close(factors.left.square().mean(), torch.tensor(1.0))


def test_a_plan_has_the_adapters_ranks_and_shapes(tmp_path: Path) -> None:
    plan = make_plan(read_manifest(_write(tmp_path)))
    expected = {name: (f.rank, f.rank, f.shape) for name, f in _terms().items()}
    assert {m.name: (m.rank_min, m.rank_max, m.factor_shape) for m in plan.modules} == expected
    assert plan.parameters_max == sum(f.parameters for f in _terms().values())


def test_all_of_an_adapters_terms_cannot_be_protected(tmp_path: Path) -> None:
    """It is the adapter that says how many its shapes have."""
    loaded = {
        count: read_manifest(_write(tmp_path, 1, MANIFEST.replace("batch", f"regularise.protect = {count}, batch")))
        for count in (7, 8)
    }
    assert make_plan(loaded[7]).modules
    with pytest.raises(PlanError, match=r"further\.toml:5:\d+: train\.regularise\.protect: .* than the 8 terms"):
        make_plan(loaded[8])


def test_what_is_hashed_is_the_adapter_and_not_its_place(tmp_path: Path) -> None:
    def keys() -> dict[str, str]:
        return prepare(read_manifest(tmp_path / "further.toml"), Workspace(tmp_path, "further"), progress=False).keys

    manifest = _write(tmp_path)
    before = keys()
    (tmp_path / "first").rename(tmp_path / "moved")
    manifest.write_text(manifest.read_text().replace('"first"', '"moved"'))
    assert keys()["init"] == before["init"]
    write_adapter(
        tmp_path / "moved", {n: f.to(torch.bfloat16).to(torch.float32) for n, f in _terms().items()}, base_model="tiny"
    )
    assert keys()["init"] != before["init"]


def test_an_adapter_that_is_kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOKA_ADAPTER_CACHE", str(tmp_path / "cache"))
    manifest = _write(tmp_path)
    near = prepare(read_manifest(manifest), Workspace(tmp_path, "further"), progress=False).keys
    with web_server() as site:
        site.upload(tmp_path / "first", "kept/first")
        text = manifest.read_text()
        manifest.write_text(text.replace('"first"', f'"{site.url}/kept/first"'))
        far = prepare(read_manifest(manifest), Workspace(tmp_path, "further"), progress=False).keys
        assert far["init"] == near["init"]
        manifest.write_text(text.replace('"first"', f'"{site.url}/kept/none"'))
        with pytest.raises(CheckpointError, match=r"adapt\[0\]\.adapter.*kept/none: no adapter_config\.json there"):
            make_plan(read_manifest(manifest))


def test_an_adapter_that_cannot_be_reached_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unreachable(given: str) -> Path:
        asked.append(given)
        raise FetchError(f"{given}: cannot be reached")

    monkeypatch.setattr(fetch, "local_adapter", unreachable)
    url = "https://127.0.0.1:1/adapter"
    manifest = _write(tmp_path, text=MANIFEST.replace('"first"', f'"{url}"'))
    with pytest.raises(CheckpointError, match=r"adapt\[0\]\.adapter.*cannot be reached"):
        soka_serve.plan(manifest)
    assert asked == [url]


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (f'"{QUERY}"', rf"adapter: no rule starts {DOWN} from the adapter, whose change there would be lost"),
        (f'"{QUERY}", "{DOWN}", "v_proj"', r"no terms for model\.layers\.0\.self_attn\.v_proj"),
    ],
)
def test_modules_that_do_not_fit(tmp_path: Path, modules: str, message: str) -> None:
    manifest = _write(tmp_path, text=MANIFEST.replace(f'"{QUERY}", "{DOWN}"', modules))
    with pytest.raises(PlanError, match=message):
        make_plan(read_manifest(manifest))


def test_a_shape_that_does_not_shard(tmp_path: Path) -> None:
    """The size for tensor parallelism comes from another rule."""
    rule = f'[[adapt]]\nmodules = ["{QUERY}"]\ntp = 4\n'
    manifest = _write(tmp_path, text=MANIFEST.replace("[[adapt]]", f"{rule}[[adapt]]"))
    with pytest.raises(PlanError, match=r"adapt\[1\]\.adapter: .*tp"):
        make_plan(read_manifest(manifest))


def test_another_base_is_refused(tmp_path: Path) -> None:
    manifest = _write(tmp_path, lock={"base": {"sha256": "0" * 64}})
    with pytest.raises(PlanError, match=r"further\.toml:.*adapt\[0\]\.adapter.* was made for other base weights"):
        prepare(read_manifest(manifest), Workspace(tmp_path, "further"), progress=False)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        open_given(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match="training goes on from SOKA and LOKR adapters"):
        open_given(tmp_path)
    manifest = _write(tmp_path)
    (tmp_path / "first" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapt\[0\]\.adapter.*no adapter"):
        make_plan(read_manifest(manifest))


def test_a_build_does_not_replace_the_adapter_that_it_goes_on_from(tmp_path: Path) -> None:
    manifest = _write(tmp_path, text=MANIFEST.replace('"first"', '"build/further/adapter"'))
    (tmp_path / "build" / "further").mkdir(parents=True)
    (tmp_path / "first").rename(tmp_path / "build" / "further" / "adapter")
    context = prepare(read_manifest(manifest), Workspace(tmp_path / "build", "further"), progress=False)
    with pytest.raises(BuildError, match="further"):
        check_output(context)
