"""Bases whose weights are quantised, or stored in a dtype that no delta can be added to: refused, or served."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from soka_serve.adapter.format import write_adapter
from soka_serve.adapter.inspect import inspect
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.builtin import base_directory
from soka_serve.cli import main
from soka_serve.errors import CheckpointError
from soka_serve.kron import Factors
from soka_serve.serving import command as serving_command
from soka_serve.serving import doctor
from soka_serve.serving.command import ServeOptions
from soka_serve.serving.serve import plan_launch
from tests.support.quantised import METHODS, Tensors, edit_config, gptq, write_copy, write_quantised

MODULE = "model.layers.0.mlp.up_proj"  # 352 x 128 in the embedded base


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a quantised base for each method."""
    folder = tmp_path_factory.mktemp("quantised")
    for method in METHODS:
        write_quantised(folder / method, method)
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(part) for part in arguments])


def write_manifest(base: Path, adapt: str = "") -> str:
    text = f"schema = 1\n[base]\npath = '{base}'\n[[adapt]]\n{adapt}\n[train]\nsteps = 1\n[train.data]\n"
    Path("m.toml").write_text(text + "builtin = 'math'\nlimit = 8\n")
    return "m.toml"


def write_small_adapter(folder: Path, *, rows: int = 352, columns: int = 128, module: str = MODULE) -> Path:
    left, right = torch.ones(1, 8, 8), torch.ones(1, rows // 8, columns // 8)
    lock = {"soka": 1, "base": {"name": "tiny", "sha256": Checkpoint.open(base_directory()).sha256()}}
    write_adapter(folder, {module: Factors(left, right, torch.ones(1))}, base_model="tiny", lock=lock)
    return folder


def refused(done: Result) -> str:
    """What a command said that refused its input: one error and one hint, no bug of ours."""
    assert done.exit_code == 2, done.output
    assert done.output.count("error: ") == done.output.count("hint: ") == 1, done.output
    return done.output


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_trained_or_merged_on_a_quantised_base(quantised: Path, tmp_path: Path, method: str) -> None:
    base = quantised / method
    manifest, adapter = write_manifest(base), write_small_adapter(tmp_path / "adapter")
    for command in (
        ["plan", manifest],
        ["build", manifest],
        ["merge", adapter, "--base", base, "--out", tmp_path / "out"],
        ["extract", base, "--base", "tiny", "--rank", "1", "--out", tmp_path / "out"],
        ["extract", base_directory(), "--base", base, "--rank", "1", "--out", tmp_path / "out"],
    ):
        said = refused(run(*command))
        assert f"{base / 'config.json'}: quantization_config: " in said, (command, said)
        assert f"({method}" in said
        assert "4bit" in said
        assert f"serve ADAPTER --base {base}" in said
    assert not (tmp_path / "out").exists()


def test_a_comparison_and_a_delta_need_plain_weights(quantised: Path, tmp_path: Path) -> None:
    base = quantised / "gptq"
    rule = f"init = 'delta'\nfinetuned = '{base}'"
    manifest = write_manifest(base_directory(), rule)
    assert "quantization_config: " in refused(run("build", manifest))
    assert "a build would stop: " in (said := run("plan", manifest).output)
    assert "quantization_config: " in said
    suite = (Path(__file__).resolve().parents[3] / "eval" / "suites" / "quick.toml").read_text()
    Path("s.toml").write_text(suite.replace('builtin = "tiny"', f"path = '{base}'"))
    for more in (["--dry-run"], ["--out", "r.json"]):
        assert "quantization_config: " in refused(run("compare", "s.toml", *more))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, ["quantization_config: ", "(gptq, 3 bits)"]),
        ({"quantization_config": {"quant_method": "new", "x": 1}}, ["quantization_config: ", "(new)"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": [4]}}, ["(gptq)"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 10**99}}, ["(gptq)"]),
        ({"quantization_config": {"load_in_8bit": True}}, ["(bitsandbytes, 8 bits)"]),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, ["compression_config: ", "compressed"]),
        (
            {"text_config": {"quantization_config": {"quant_method": "awq", "w_bit": 4}}},
            ["text_config.quantization_config: ", "(awq, 4 bits)"],
        ),
        ({"quantization_config": "gptq"}, ["quantization_config: expected an object, got 'gptq'"]),
        ({"quantization_config": [4]}, ["quantization_config: expected an object, got [4]"]),
        ({"quantization_config": {}}, ["quantization_config: names no quant_method"]),
        ({"quantization_config": {"quant_method": 3}}, ["quantization_config: names no quant_method"]),
        ({"quantization_config": {"quant_method": "\x1b[31m" * 99}}, ["\\x1b[31m"]),
    ],
)
def test_what_a_config_may_say(tmp_path: Path, config: dict[str, Any], words: list[str]) -> None:
    """Plain weights or not: transformers would take them for quantised, or stop; the config alone decides."""
    base = write_copy(tmp_path / "base", lambda name, weight: {name: weight}, config)
    adapter = write_small_adapter(tmp_path / "adapter")
    for command in (["plan", write_manifest(base)], ["merge", adapter, "--base", base, "--out", tmp_path / "out"]):
        said = refused(run(*command))
        assert all(word in said for word in words), said
    shutil.move(base / "model.safetensors", tmp_path / "away")  # a plan from the config alone
    assert all(word in refused(run("plan", "m.toml")) for word in words)


def test_null_says_nothing(tmp_path: Path) -> None:
    base = shutil.copytree(base_directory(), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": None, "text_config": None}))
    assert run("plan", write_manifest(base)).exit_code == 0


def test_a_config_of_its_own_file(quantised: Path, tmp_path: Path) -> None:
    """ModelOpt's older checkpoints, which vLLM takes for quantised."""
    base = shutil.copytree(quantised / "fp8", tmp_path / "base")
    edit_config(base, {"quantization_config": None})
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (base / "hf_quant_config.json").write_text(json.dumps(said))
    said_of_it = refused(run("plan", write_manifest(base)))
    assert f"{base / 'hf_quant_config.json'}: " in said_of_it
    assert "(modelopt, 8 bits)" in said_of_it


def test_inspect_shows_it(quantised: Path) -> None:
    for method in METHODS:
        found = inspect(quantised / method)
        assert method in str(found.facts["quantised"])
        assert "parameters" not in found.facts, "packed values are no parameters"
        assert found.facts["stored values"]
    assert inspect(quantised / "gptq").facts["quantised"] == "gptq, 4 bits"
    assert "quantised" not in inspect(base_directory()).facts


# --------------------------------------------------------------------------------------- dtypes outside of any config


def to(dtype: torch.dtype) -> Callable[[str, torch.Tensor], Tensors]:
    return lambda name, weight: {name: weight.to(dtype)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (to(torch.float8_e4m3fn), ["F8_E4M3", "model.layers.0.mlp.down_proj.weight and 2 more"]),
        (to(torch.float8_e5m2), ["F8_E5M2"]),
        (to(torch.float8_e8m0fnu), ["F8_E8M0"]),
        (to(torch.int8), ["I8"]),
        (to(torch.uint8), ["U8"]),
        (to(torch.bool), ["BOOL"]),
        (to(torch.complex64), ["C64"]),
        (gptq, ["I32", "model.layers.0.mlp.down_proj.qweight"]),
        (METHODS["compressed-tensors"][0], ["I32", "weight_packed"]),
        (METHODS["fp8"][0], ["F8_E4M3", "down_proj.weight"]),
    ],
    ids=["e4m3", "e5m2", "e8m0", "int8", "uint8", "bool", "complex", "gptq", "packed", "scaled"],
)
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_weights_that_are_no_plain_floats(
    tmp_path: Path, change: Callable[[str, torch.Tensor], Tensors], words: list[str]
) -> None:
    base = write_copy(tmp_path / "base", lambda n, w: {n: w} | (change(n, w) if "layers.0.mlp" in n else {}))
    adapter = write_small_adapter(tmp_path / "adapter")
    manifest = write_manifest(base, "modules = ['q_proj']")  # whichever are adapted: the model is loaded whole
    for command in (
        ["plan", manifest],
        ["build", manifest],
        ["merge", adapter, "--base", base, "--out", tmp_path / "out"],
    ):
        said = refused(run(*command))
        assert all(word in said for word in [str(base / "model.safetensors"), "BF16", *words]), said
        assert "save_pretrained" in said


def test_integers_that_are_no_weights(tmp_path: Path) -> None:
    """Masks and positions, which some checkpoints hold."""
    more = {"model.mask": torch.ones(4, 4, dtype=torch.bool), "model.position_ids": torch.arange(4)[None]}
    base = write_copy(tmp_path / "base", lambda name, weight: {name: weight} | more)
    assert run("plan", write_manifest(base)).exit_code == 0


# ------------------------------------------------------------------------------------------------------------- serve


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_base_is_served(quantised: Path, tmp_path: Path, method: str) -> None:
    adapter = write_small_adapter(tmp_path / "adapter")
    targets, launch = plan_launch([str(adapter)], ServeOptions(), base=str(quantised / method))
    assert len(targets) == 1
    assert str(quantised / method) in launch.command


@pytest.mark.parametrize(("method", "bits"), [("fp8", 8), ("compressed-tensors", 4)])
def test_a_dry_run_says_what_it_cannot_compare(
    quantised: Path, tmp_path: Path, method: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command for vLLM, which is left the method, in place of the base that the adapter names."""
    base = quantised / method
    monkeypatch.setattr(serving_command, "find_engine", lambda: doctor.InstalledVllm("vllm", "0.32.0", is_cpu=False))
    done = run("serve", write_small_adapter(tmp_path / "math"), "--base", base, "--dry-run")
    assert done.exit_code == 0, done.output
    told = f"{base} is quantised ({method}, {bits} bits): it cannot be compared with the weights in soka.lock\n"
    assert done.stderr.endswith(told)
    words = shlex.split(done.stdout)
    assert words[words.index("soka_serve.serving.vllm_command") + 1] == str(base.resolve())
    assert words[words.index("--lora-modules") + 1] == f"math={tmp_path / 'math'}"
    assert words[words.index("--served-model-name") + 1] == method
    assert "--quantization" not in words  # vLLM reads config.json
    misfit = write_small_adapter(tmp_path / "turned", rows=128, columns=352)
    said = refused(run("serve", misfit, "--base", base, "--dry-run"))
    wrong = "the adapter's factors [8, 8, 16, 44] make a (128, 352) delta, the base's weight"
    assert f"{misfit}: {MODULE}: {wrong}" in said
    assert f"the base is {base}" in said


@pytest.mark.parametrize("method", METHODS)
def test_what_the_headers_still_tell_of_a_shape_is_checked(quantised: Path, tmp_path: Path, method: str) -> None:
    base = str(quantised / method)
    for name, sizes in {
        "other": {"rows": 128, "columns": 128},  # of another number of values
        "absent": {"module": "model.layers.99.mlp.up_proj"},
    }.items():
        adapter = write_small_adapter(tmp_path / name, **sizes)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=r"up_proj: ") as caught:
            plan_launch([str(adapter)], ServeOptions(), base=base)
        assert "the base" in caught.value.message
    turned = write_small_adapter(tmp_path / "turned", rows=128, columns=352)
    if method == "bitsandbytes":  # one row of bytes: only the engine can tell
        assert plan_launch([str(turned)], ServeOptions(), base=base)
    else:
        with pytest.raises(CheckpointError, match=r"up_proj: .*128, 352"):
            plan_launch([str(turned)], ServeOptions(), base=base)


def test_a_method_that_nobody_knows_is_left_to_the_engine(tmp_path: Path) -> None:
    def change(name: str, weight: torch.Tensor) -> Tensors:
        return {f"{name.removesuffix('.weight')}.codes": torch.zeros(weight.shape[0], 3, dtype=torch.int16)}

    base = write_copy(tmp_path / "base", change, {"quantization_config": {"quant_method": "new"}})
    assert plan_launch([str(write_small_adapter(tmp_path / "adapter"))], ServeOptions(), base=str(base))


@pytest.mark.parametrize("said", ["gptq", {}, [1]])
def test_a_malformed_config_is_not_served(tmp_path: Path, said: object) -> None:
    base = write_copy(tmp_path / "base", lambda name, weight: {name: weight}, {"quantization_config": said})
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config: "):
        plan_launch([str(write_small_adapter(tmp_path / "adapter"))], ServeOptions(), base=str(base))
