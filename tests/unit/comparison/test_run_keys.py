"""What the runs of a comparison are filed under."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from soka_serve.adapter.format import write_adapter
from soka_serve.builtin import base_directory
from soka_serve.comparison import inputs as inputs_module
from soka_serve.comparison.inputs import read_inputs
from soka_serve.comparison.plan import RunInputs, list_cells
from soka_serve.comparison.read import read_suite
from soka_serve.errors import BuildError, CheckpointError
from soka_serve.io.workspace import HashCache, Workspace
from soka_serve.kron.shapes import FactorShape
from tests.support.kron_oracle import draw_factors
from tests.support.suites import GOOD, INPUTS, START, TEXT, cells_of


def test_keys_of_records_stay() -> None:
    """Records are kept for months: a key that is added to manifests must not make them another run's at its default."""
    first, *_, second = cells_of(TEXT.replace('builtin = "tiny"', 'path = "base"\ndtype = "float32"'))
    runs = ((first, START), (second, START[:1]))
    keys = [cell.spec(stage, setting, 0).key for cell, setting in runs for stage in ("sweep", "final")]
    assert keys == [
        "c8d3d24e13a4796d41d8a759",
        "0ded26ef23f81f5de22cead4",
        "7c3ad8b2586ed6846e9afbbc",
        "905a81c221b66507d13b16ee",
    ]


def test_a_run_is_filed_under_everything_that_determines_it() -> None:
    def key(text: str = TEXT, inputs: RunInputs = INPUTS, stage: Any = "final") -> str:
        return cells_of(text, inputs)[0].spec(stage, START, 0).key

    assert key() == key()
    cell = cells_of()[0]
    other = (("learning_rate", 1.0), ("scale", 2.0))
    assert len({cell.spec("final", setting, seed).key for setting in (START, other) for seed in (0, 1)}) == 4
    assert key(stage="sweep") != key()
    # Grids, seeds, priorities, names and how settings are chosen say which runs there are, and change none.
    for old, new in (
        ("[1.0, 2.0, 4.0]", "[2.0, 3.0]"),
        ("seeds = [0, 1]", "seeds = [0]"),
        ("first", "other"),
        ("[protocol]", "[protocol]\nvalidation = 20"),
    ):
        assert key(TEXT.replace(old, new, 1)) == key(), new
    assert key(TEXT.replace("[protocol]", "[protocol]\nvalidation = 20"), stage="sweep") != key(stage="sweep")
    # Fresh test problems are drawn besides the validation problems, where those are more than builds measure by.
    fresh = TEXT.replace("[protocol]", "[protocol]\nvalidation = 20")
    fresh = fresh.replace("[[dataset]]", "[[dataset]]\ntest_seed = 2")
    assert key(fresh.replace("validation = 20", "validation = 30")) == key(fresh)
    assert key(fresh.replace("validation = 20", "validation = 600")) != key(fresh)
    for old, new in (
        ("steps = 20", "steps = 21"),
        ("steps = 20", "steps = 20\nbatch_size = 4"),
        ("[protocol]", "[protocol]\ntest = 10"),
        ("[protocol]", "[protocol]\nanswered = 10"),
        ("[protocol]", "[protocol]\nmax_new_tokens = 10"),
        ('method = "lora"', 'method = "dora"'),
        ('method = "lora"', 'method = "lora"\nrank = 2'),
        ('method = "lora"', 'method = "lora"\nadapt = { modules = ["q_proj"] }'),
        ("[[method]]", '[[other]]\nname = "o"\ndata = { builtin = "code" }\n[[method]]'),
    ):
        inputs = RunInputs(INPUTS.base, INPUTS.papers, INPUTS.data, {"o": "o"}, INPUTS.versions, "cpu")
        assert key(TEXT.replace(old, new, 1), inputs) != key(), new
    for inputs in (
        RunInputs("other", INPUTS.papers, INPUTS.data, {}, INPUTS.versions, "cpu"),
        RunInputs("base", "others", INPUTS.data, {}, INPUTS.versions, "cpu"),
        RunInputs("base", INPUTS.papers, {"math": "x", "code": "c"}, {}, INPUTS.versions, "cpu"),
        RunInputs("base", INPUTS.papers, INPUTS.data, {}, {"torch": "2"}, "cpu"),
        RunInputs("base", INPUTS.papers, INPUTS.data, {}, INPUTS.versions, "cuda"),
    ):
        assert key(inputs=inputs) != key()


def test_what_a_base_is_read_by_is_one_of_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = shutil.copytree(base_directory(), tmp_path / "base")
    (tmp_path / "s.toml").write_text(GOOD.replace('builtin = "tiny"', 'path = "base"'))
    loaded = read_suite(tmp_path / "s.toml")

    def inputs(folder: str) -> RunInputs:
        workspace = Workspace(tmp_path / folder, "s")
        workspace.cache.mkdir(parents=True)
        return read_inputs(loaded, HashCache(workspace.hashes))

    first = inputs("1")
    for name in ("config.json", "tokenizer.json"):
        before = (base / name).read_text()
        (base / name).write_text(before + "\n")
        found = inputs(name)
        assert (found.base, found.papers != first.papers) == (first.base, True), name
        (base / name).write_text(before)
    assert inputs("2") == first
    # A checkpoint in half precision is held as float32 on some CPUs only.
    monkeypatch.setattr(inputs_module, "has_nvidia_gpu", lambda: False)
    (file,) = base.glob("*.safetensors")
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    devices = set()
    for amx in (True, False):
        monkeypatch.setattr("soka_serve.kron.cpu.has_amx", lambda amx=amx: amx)
        devices.add(inputs(f"amx {amx}").device)
    assert devices == {"cpu with AMX", "cpu without AMX"}


def test_what_a_method_starts_from_is_an_input_by_its_content(tmp_path: Path) -> None:
    """Files that are replaced make other runs, and a folder that was moved does not."""
    shutil.copytree(base_directory(), tmp_path / "tuned")
    for name, digit in (("first", 1.0), ("again", 2.0)):
        factors = draw_factors(FactorShape(2, 4, 64, 32), 2, scale=digit).to(torch.float32)
        write_adapter(tmp_path / name, {"model.layers.0.self_attn.q_proj": factors}, base_model="tiny")

    def key(rule: str) -> str:
        old = 'init = "random", rank = { policy = "fixed", rank = 2 }'
        text = GOOD.replace(old, rule + ', modules = ["model.layers.0.self_attn.q_proj"]')
        (tmp_path / "s.toml").write_text(text)
        loaded = read_suite(tmp_path / "s.toml")
        workspace = Workspace(tmp_path / "work", "s")
        workspace.cache.mkdir(parents=True, exist_ok=True)
        cell = list_cells(loaded.suite, read_inputs(loaded, HashCache(workspace.hashes)))[1]
        return cell.spec("final", (("learning_rate", 1e-2), ("train.sigma_lr", 0.5)), 0).key

    for kind, start in (("adapter", "adapter"), ("finetuned", "delta")):
        name = {"adapter": "first", "finetuned": "tuned"}[kind]
        before = key(f'init = "{start}", {kind} = "{name}"')
        shutil.move(tmp_path / name, tmp_path / f"moved-{kind}")
        assert key(f'init = "{start}", {kind} = "moved-{kind}"') == before
        if kind == "adapter":
            shutil.move(tmp_path / "again", tmp_path / name)
        else:
            shutil.move(tmp_path / f"moved-{kind}", tmp_path / name)
            (file,) = (tmp_path / name).glob("*.safetensors")
            save_file({k: 2 * v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
        assert key(f'init = "{start}", {kind} = "{name}"') != before
    with pytest.raises(CheckpointError, match=r"s.toml:\d+:\d+: method\[1\].adapt.adapter: .*none: no adapter"):
        key('init = "adapter", adapter = "none"')
    with pytest.raises(BuildError, match=r"adapter: https://host/math may be another adapter at the next run"):
        key('init = "adapter", adapter = "https://host/math"')
