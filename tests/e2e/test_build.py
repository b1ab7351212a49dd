"""`soka-serve build` from end to end on the embedded base: artefacts, caching, errors, interruption."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file

import soka_serve
import soka_serve.builtin
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.errors import BuildError, SokaError
from soka_serve.io.lockfile import read_lock
from tests.conftest import ROOT
from tests.support import preloaded
from tests.support.builds import adapter_bytes, run_cli, same_tensors, start_cli, write_manifest
from tests.support.launched import NO_GPU, launched_environments
from tests.support.serving import free_port

ACCEPT = Path(__file__).resolve().parents[3] / "shared" / "accept" / "check_adapter.py"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> soka_serve.compiler.build.BuildResult:
    """One build that the reading tests share."""
    folder = tmp_path_factory.mktemp("built")
    return soka_serve.build(write_manifest(folder), out=folder / "build", progress=False)


def test_a_build_writes_every_artefact(built: soka_serve.compiler.build.BuildResult) -> None:
    assert built.ran == ("init", "tune", "export", "merge", "check", "report")
    for name in (
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
        "adapter/soka.lock",
        "merged/model.safetensors",
        "merged/config.json",
        "merged/tokenizer.json",
        "soka.lock",
        "report.html",
        "README.md",
        "history.jsonl",
        "manifest.toml",
    ):
        assert (built.directory / name).is_file(), name
    assert not list(built.directory.parent.glob(".small.*")), "temporary siblings are gone"
    for file in built.directory.rglob("*"):
        if file.suffix in (".md", ".lock", ".json", ".html"):
            assert ".tmp-" not in file.read_text(), f"{file} names a temporary folder"
    assert read_lock(built.directory / "merged" / "soka.lock")["adapters"]["adapter0"]["name"] == "small"


def test_the_artefacts_pass_the_independent_check(built: soka_serve.compiler.build.BuildResult) -> None:
    if not ACCEPT.exists():
        pytest.skip(f"no {ACCEPT}: the independent check runs where the shared folder is")
    base = soka_serve.builtin.base_directory()
    command = [sys.executable, ACCEPT, "--base", base, "--adapter", built.adapter, "--merged", built.merged]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["modules"] == 12


def test_adapter_and_merged_model_agree_and_differ_from_the_base(built: soka_serve.compiler.build.BuildResult) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import soka_serve.peft  # registers SOKA
    from tests.support.tolerances import TOLERANCE

    base = AutoModelForCausalLM.from_pretrained(soka_serve.builtin.base_directory())
    tokens = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        plain = base(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(built.merged)(tokens).logits
        adapted = PeftModel.from_pretrained(base, str(built.adapter))(tokens).logits
    rtol, atol = TOLERANCE[torch.float32][:2]
    torch.testing.assert_close(adapted, merged, rtol=rtol, atol=atol * float(merged.abs().max()))
    assert (adapted - plain).abs().max() > 1e-2


def test_nothing_changed_means_nothing_is_done(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    first = soka_serve.build(manifest, out=tmp_path / "build", progress=False)
    stamp = (first.directory / "soka.lock").stat()
    again = soka_serve.build(manifest, out=tmp_path / "build", progress=False)
    assert again.ran == ()
    assert (again.directory / "soka.lock").stat().st_ino == stamp.st_ino
    assert again.accuracy_after == first.accuracy_after

    # Only what depends on the changed key runs again.
    before = adapter_bytes(first.directory)
    write_manifest(tmp_path, output='merged_dtype = "bfloat16"')
    assert soka_serve.build(manifest, out=tmp_path / "build", progress=False).ran == ("merge", "report")
    assert adapter_bytes(first.directory) == before
    write_manifest(tmp_path, output='merged_dtype = "bfloat16"', save_every=3)
    assert soka_serve.build(manifest, out=tmp_path / "build", progress=False).ran == ("report",)
    write_manifest(tmp_path, output='merged_dtype = "bfloat16"', learning_rate=4.0)
    ran = soka_serve.build(manifest, out=tmp_path / "build", progress=False).ran
    assert ran == ("tune", "export", "merge", "check", "report")
    assert adapter_bytes(first.directory) != before
    # A deleted file comes back.
    (first.directory / "merged" / "config.json").unlink()
    assert "merge" in soka_serve.build(manifest, out=tmp_path / "build", progress=False).ran
    assert (first.directory / "merged" / "config.json").exists()
    write_manifest(tmp_path, replace=("rank = 1", "rank = 2"))
    assert soka_serve.build(manifest, out=tmp_path / "build", progress=False).ran[0] == "init"


def test_only_what_is_asked_for_is_written(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, replace=('["adapter", "merged"]', '["merged"]'))
    result = soka_serve.build(manifest, out=tmp_path / "build", progress=False)
    assert result.adapter is None
    assert result.merged is not None
    assert not (result.directory / "adapter").exists()
    assert "PeftModel" not in (result.directory / "README.md").read_text()
    assert soka_serve.build(manifest, out=tmp_path / "build", progress=False).ran == ()


@pytest.mark.parametrize("method", ["soka", "lora"])
def test_a_base_that_was_moved(tmp_path: Path, method: str) -> None:
    def named(result: soka_serve.compiler.build.BuildResult) -> str:
        config: dict[str, str] = json.loads((result.directory / "adapter" / "adapter_config.json").read_text())
        return config["base_model_name_or_path"]

    shutil.copytree(soka_serve.builtin.base_directory(), tmp_path / "one")
    manifest = write_manifest(tmp_path, steps=2, replace=("steps =", f'method = "{method}"\nsteps ='))
    text = manifest.read_text()
    manifest.write_text(text.replace('builtin = "tiny"', 'path = "one"'))
    assert named(soka_serve.build(manifest, out=tmp_path / "build", progress=False)) == str(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    manifest.write_text(text.replace('builtin = "tiny"', 'path = "two"'))
    again = soka_serve.build(manifest, out=tmp_path / "build", progress=False)
    assert again.ran == ("report",)  # the adapter names its base anew; nothing else depends on the place
    assert named(again) == str(tmp_path / "two")


def test_a_folder_with_other_files_is_refused_before_anything_runs(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    (tmp_path / "build" / "small").mkdir(parents=True)
    thesis = tmp_path / "build" / "small" / "thesis.tex"
    thesis.write_text("years of work")
    with pytest.raises(BuildError, match=r"no soka\.lock in it says that it is a build.*thesis\.tex"):
        soka_serve.build(manifest, out=tmp_path / "build", progress=False)
    assert thesis.read_text() == "years of work"
    assert not list((tmp_path / "build" / ".cache" / "small").glob("init-*"))


@pytest.mark.parametrize(
    ("init", "calibration", "more"),
    [("weights", 2, ""), ("zero", 0, ""), ("gradient", 0, ""), ("gradient", 2, ""), ("gradient", 2, 'right = "dct"')],
)
def test_every_initialisation_builds(tmp_path: Path, init: str, calibration: int, more: str) -> None:
    rule = f'init = "{init}"\ncalibration_batches = {calibration}\n{more}'
    manifest = write_manifest(tmp_path, steps=3, start=rule)
    result = soka_serve.build(manifest, out=tmp_path / "build", progress=False)
    assert result.adapter is not None
    assert result.merged is not None  # and was compared with base + adapter, weights and logits
    from soka_serve.adapter.format import read_adapter

    adapter = read_adapter(result.adapter)
    assert all(float(f.sigma.abs().max()) > 0 for f in adapter.factors.values())
    twice = init != "zero" and not more  # trained minus initial terms
    assert {f.rank for f in adapter.factors.values()} == {2 if twice else 1}
    name = "model.layers.0.self_attn.q_proj.weight"
    base, merged = (Checkpoint.open(place) for place in (soka_serve.builtin.base_directory(), result.merged))
    assert not merged.read(name).equal(base.read(name))


@pytest.mark.parametrize("method", ["lora", "pissa", "lokr", "full"])
def test_baselines_are_one_word_apart(tmp_path: Path, method: str) -> None:
    manifest = write_manifest(
        tmp_path, steps=3, learning_rate=1e-3, replace=("steps =", f'method = "{method}"\nsteps =')
    )
    result = soka_serve.build(manifest, out=tmp_path / "build", progress=False)
    assert result.merged is not None
    assert (result.adapter is None) == (method == "full")
    base = Checkpoint.open(soka_serve.builtin.base_directory())
    merged = Checkpoint.open(result.merged)
    name = "model.layers.0.self_attn.q_proj.weight"
    change = (merged.read(name) - base.read(name)).abs().max()
    assert 0 < change < 0.5


def test_ctrl_c_and_sigkill_leave_the_last_good_build(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    first = soka_serve.build(manifest, out=tmp_path / "build", progress=False)
    before = adapter_bytes(first.directory)
    write_manifest(tmp_path, learning_rate=8.0, steps=400)
    log = tmp_path / "log"
    process = start_cli("build", manifest, "--out", tmp_path / "build", cwd=tmp_path, log=log)
    deadline = time.monotonic() + 120
    while (
        not list((tmp_path / "build" / ".cache" / "small").glob("tune-*/checkpoint-*")) and time.monotonic() < deadline
    ):
        if process.poll() is not None:
            pytest.fail(f"ended before it could be interrupted: {log.read_text()}")
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, errors = process.wait(60), log.read_text()
    assert code == 2, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert adapter_bytes(first.directory) == before


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, pytest.param(20, marks=pytest.mark.slow_matrix)])
def test_a_build_killed_at_random_points_ends_like_an_uninterrupted_one(tmp_path: Path, count: int) -> None:
    manifest = write_manifest(tmp_path, steps=40, save_every=4)
    whole = tmp_path / "whole" / "small"
    command = ["build", str(manifest), "--out", str(tmp_path / "build")]
    assert run_cli(*command[:-1], tmp_path / "whole", cwd=tmp_path).returncode == 0
    started = time.monotonic()
    assert run_cli(*command[:-1], tmp_path / "timing", cwd=tmp_path).returncode == 0
    typical_s = time.monotonic() - started
    chance = random.Random(0)
    kills = 0
    while kills < count:
        started = time.monotonic()
        process = start_cli(*command, cwd=tmp_path)
        try:
            process.wait(timeout=chance.uniform(0.05, 1.0) * typical_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        else:
            # It got through: from here on kills hit a forced rebuild over a good artefact.
            assert process.returncode == 0
            assert same_tensors(
                whole / "adapter" / "adapter_model.safetensors",
                tmp_path / "build" / "small" / "adapter" / "adapter_model.safetensors",
            )
            command = [*command, "--force"] if "--force" not in command else command
            typical_s = min(typical_s, time.monotonic() - started)  # a machine that was busy is so no longer
            continue
        kills += 1
        final = tmp_path / "build" / "small"
        if final.exists():  # what stands there is always whole
            assert same_tensors(
                whole / "adapter" / "adapter_model.safetensors",
                final / "adapter" / "adapter_model.safetensors",
            )
    assert run_cli(*(c for c in command if c != "--force"), cwd=tmp_path).returncode == 0
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert same_tensors(whole / name, tmp_path / "build" / "small" / name), name
    leftovers = [p.name for p in (tmp_path / "build").iterdir() if p.name not in (".cache", "small")]
    assert leftovers == []


def launch_on_two_machines(manifests: Sequence[Path], outs: Sequence[Path]) -> list[tuple[int, str, str]]:
    """Build by one `accelerate launch` for each of two machines, here two addresses of this one: exit codes and
    outputs."""
    config, port = str(ROOT / "eval" / "configs" / "multi_cpu.yaml"), str(free_port())
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_machines", "2"]
    launch += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    programs = [
        subprocess.Popen(
            [*launch, "--machine_rank", str(rank), "-m", "soka_serve", "build", str(manifest), "--out", str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank, (manifest, out) in enumerate(zip(manifests, outs, strict=True))
    ]
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda program: program.communicate(timeout=900), programs))
    return [(program.returncode, *text) for program, text in zip(programs, texts, strict=True)]


# Every pass over the data that a start can need, and a budget, which settles ranks over all machines' modules.
STARTS = """
[[adapt]]
modules = ["k_proj"]
init = "gradient"
calibration_batches = 2

[[adapt]]
modules = ["o_proj"]
init = "weights"
weighting = "both"
calibration_batches = 2

[[adapt]]
modules = ["gate_proj", "up_proj"]
init = "weights"
calibration_batches = 2
rank = { policy = "budget", parameters = 4000, max = 4 }
"""


@pytest.mark.parametrize("config", ["multi_cpu", "fsdp"])
def test_two_machines_build_what_one_does(tmp_path: Path, config: str) -> None:
    """In the environments that `accelerate launch` makes on each."""
    manifest = write_manifest(tmp_path, steps=3, replace=("\n[train]", STARTS + "\n[train]"))
    port = {"MASTER_PORT": str(free_port()), **NO_GPU}
    command = ("soka_serve", "build", manifest, "--out", tmp_path / "two")

    def build(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (config == "fsdp")
        return preloaded.run("soka", command, cwd=tmp_path, env=environment | port, timeout=900)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build, launched_environments(config, tmp_path, machines=2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "adapter     " in first.stdout
    assert second.stdout == "", "only the first process reports"
    alone = soka_serve.build(manifest, out=tmp_path / "one", progress=False)
    one, two = (json.loads((tmp_path / out / "small" / "init.json").read_text()) for out in ("one", "two"))
    assert one["initial"] == two["initial"]
    for ours, theirs in zip(one["modules"], two["modules"], strict=True):
        # The number of threads differs between the two runs, and with it the order of summation.
        for inexact in ("sigma", "total_energy"):
            assert ours.pop(inexact) == pytest.approx(theirs.pop(inexact), rel=1e-5)
        assert ours == theirs
    ours, theirs = (load_file(next((tmp_path / out).rglob("init.safetensors"))) for out in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert float((tensor - theirs[name]).norm()) < 1e-3 * float(tensor.norm()), name
    # Two processes see twice the examples a step, so the weights differ; both have learned something.
    assert adapter_bytes(alone.directory) != adapter_bytes(tmp_path / "two" / "small")
    assert (tmp_path / "two" / "small" / "merged" / "model.safetensors").exists()


def test_machines_that_share_no_folder_end_with_the_reason(tmp_path: Path) -> None:
    """Neither waits for the other."""
    for code, _, errors in launch_on_two_machines([write_manifest(tmp_path)] * 2, [tmp_path / "out", tmp_path / "b"]):
        assert code != 0
        assert f"{tmp_path / 'out' / '.cache' / 'small'}: not the same folder on all machines" in errors
    assert not (tmp_path / "out" / "small").exists()


def test_real_gsm8k_goes_through(tmp_path: Path, shared_data: Path) -> None:
    manifest = tmp_path / "gsm8k.toml"
    manifest.write_text(f"""
schema = 1
[base]
builtin = "tiny"
[train]
steps = 4
batch_size = 2
max_length = 512
[train.data]
jsonl = "{shared_data / "gsm8k_train.jsonl"}"
eval_jsonl = "{shared_data / "gsm8k_test.jsonl"}"
prompt = "Question: {{{{ question }}}}\\nAnswer:"
completion = " {{{{ answer }}}}"
limit = 200
[eval]
limit = 2
max_new_tokens = 16
""")
    result = soka_serve.build(manifest, out=tmp_path / "build", progress=False)
    from soka_serve.adapter.format import read_adapter

    assert result.adapter is not None
    adapter = read_adapter(result.adapter)
    assert len(adapter.factors) == 28
    history = [json.loads(line) for line in (result.directory / "history.jsonl").read_text().splitlines()]
    assert any(point.get("loss", 0) > 1 for point in history)
    assert "Question:" in (result.directory / "report.html").read_text()


def test_a_build_in_progress_is_not_disturbed(tmp_path: Path) -> None:
    from soka_serve.io.workspace import Workspace

    manifest = write_manifest(tmp_path)
    with Workspace(tmp_path / "build", "small").locked(), pytest.raises(SokaError, match="another build"):
        soka_serve.build(manifest, out=tmp_path / "build", progress=False)
