"""Wrong input to `soka-serve build`, as a user makes it: one clear error, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from soka_serve.base.checkpoint import Checkpoint
from soka_serve.builtin import base_directory
from soka_serve.cli import main
from tests.support import preloaded
from tests.support.builds import adapter_bytes, run_cli, write_manifest
from tests.support.tiny_models import random_factors, write_test_adapter

BASE = 'builtin = "tiny"'
Q_PROJ = "model.layers.0.self_attn.q_proj"
DATA = 'data = { builtin = "math", limit = 64 }'


def _base(spoil: Callable[[Path], object]) -> Callable[[Path], tuple[str, str]]:
    """A copy of the embedded base whose weights file is spoilt."""

    def make(directory: Path) -> tuple[str, str]:
        spoil(shutil.copytree(base_directory(), directory / "base") / "model.safetensors")
        return BASE, 'path = "base"'

    return make


def _pickled(file: Path) -> None:
    file.unlink()
    torch.save({}, file.with_name("pytorch_model.bin"))


def _truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def _tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], tuple[str, str]]:
    """A base with one tensor changed."""

    def spoil(file: Path) -> None:
        tensors = load_file(file)
        changed = {f"{Q_PROJ}.weight": change(tensors[f"{Q_PROJ}.weight"]).contiguous()}
        save_file({**tensors, **changed}, file, metadata={"format": "pt"})

    return _base(spoil)


def _jsonl(text: str, options: str = "") -> Callable[[Path], tuple[str, str]]:
    def make(directory: Path) -> tuple[str, str]:
        (directory / "data.jsonl").write_text(text)
        return DATA, f'data = {{ jsonl = "data.jsonl"{options} }}'

    return make


def _replace(old: str, new: str) -> Callable[[Path], tuple[str, str]]:
    return lambda _: (old, new)


GOOD = json.dumps({"prompt": "1 + 1 =", "completion": " 2"}) + "\n"

CASES: dict[str, tuple[Callable[[Path], tuple[str, str]], list[str]]] = {
    "missing base": (_replace(BASE, 'path = "nowhere"'), ["nowhere"]),
    "no weights": (_base(Path.unlink), ["base", "safetensors"]),
    "pickled weights": (_base(_pickled), ["pytorch_model.bin", "safetensors"]),
    "truncated weights": (_base(_truncated), ["model.safetensors", "truncated"]),
    "not safetensors": (_base(lambda file: file.write_bytes(b"\x00" * 100)), ["model.safetensors"]),
    "NaN weight": (
        _tensor(lambda weight: weight.index_fill(0, torch.tensor(3), float("nan"))),
        ["model.layers.0.self_attn.q_proj.weight"],
    ),
    "wrong shape": (_tensor(lambda weight: weight[:64]), [Q_PROJ]),
    "hub out of reach": (_replace(BASE, 'hub = "nobody/nothing"'), ["nobody/nothing"]),
    "missing data": (_replace(DATA, 'data = { jsonl = "nowhere.jsonl" }'), ["nowhere.jsonl"]),
    "empty data": (_jsonl(""), ["data.jsonl", "empty"]),
    "malformed line": (_jsonl(GOOD + '{"prompt": \n'), ["data.jsonl:2"]),
    "not an object": (_jsonl(GOOD + GOOD + "[1]\n"), ["data.jsonl:3"]),
    "missing column": (
        _jsonl(GOOD, ', prompt = "{{ question }}"'),
        ["data.jsonl:1", "'question'", "'completion', 'prompt'"],
    ),
    "everything too long": (_replace("steps =", "max_length = 2\nsteps ="), ["max_length"]),
    "no module matched": (_replace('"q_proj", "v_proj"', '"q_prj", "v_proj"'), ["q_prj", "q_proj"]),
    "layer out of range": (_replace("rank = { policy", 'layers = "9-12"\nrank = { policy'), ["9-12", "0-3"]),
    "shape that does not fit": (_replace("rank = { policy", "shape = [3, 3, 3, 3]\nrank = { policy"), ["q_proj"]),
    "lm_head": (_replace('"q_proj", "v_proj"', '"lm_head"'), ["lm_head"]),
    "float16 without a GPU": (_replace("steps =", 'precision = "float16"\nsteps ='), ["float16", "GPU"]),
    "unknown key": (_replace("steps =", "stepz = 3\nsteps ="), ["small.toml:14:1", "did you mean"]),
    "a tracker that is not there": (_replace("steps =", 'report_to = ["mlflow"]\nsteps ='), ["mlflow"]),
}


def _build(manifest: Path) -> Result:
    return CliRunner().invoke(main, ["build", str(manifest), "--out", str(manifest.parent / "build")])


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, tmp_path: Path) -> None:
    make, words = CASES[case]
    if case == "float16 without a GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    manifest = write_manifest(tmp_path, replace=make(tmp_path))
    done = _build(manifest)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    for word in words:
        assert word in done.output
    assert not (tmp_path / "build" / "small").exists()


def test_the_last_good_build_outlives_bad_input(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    built = _build(manifest)
    assert built.exit_code == 0, built.output
    before = adapter_bytes(tmp_path / "build" / "small")
    # A term that starts at zero and becomes huge at once gives a finite loss, and no gradient: this starts elsewhere.
    write_manifest(tmp_path, learning_rate=1e30)
    done = _build(manifest)
    assert done.exit_code == 2, done.output
    assert "diverged" in done.output or "finite" in done.output
    assert adapter_bytes(tmp_path / "build" / "small") == before


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    (tmp_path / "build").write_text("in the way")
    done = run_cli("build", manifest, "--out", tmp_path / "build", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert str(tmp_path / "build") in done.stderr
    assert "hint" in done.stderr
    assert (tmp_path / "build").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root without setpriv")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    command = [sys.executable, "-m", "soka_serve", "build", str(manifest), "--out", str(folder / "build")]
    if os.geteuid() == 0:
        # Root may write anywhere, so it must become nobody, who can read this checkout only where others may.
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
        probe = subprocess.run([*command[:4], sys.executable, "-c", "import soka_serve"], check=False)
        if probe.returncode:
            pytest.skip("another user cannot run this interpreter here")
        for path in (tmp_path, *tmp_path.parents):
            path.chmod(path.stat().st_mode | 0o055)
            if path.name.startswith("pytest-of-"):  # pytest's own; what is above is not
                break
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "HOME": "/"})
    assert done.returncode == 2, done.stderr
    assert "closed" in done.stderr
    assert "Traceback" not in done.stderr


def test_disk_full_leaves_the_last_good_build(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the merged model (3 MB) no longer fits."""
    manifest = write_manifest(tmp_path)
    built = _build(manifest)
    assert built.exit_code == 0, built.output
    before = (tmp_path / "build" / "small" / "merged" / "model.safetensors").read_bytes()
    write_manifest(tmp_path, output='merged_dtype = "bfloat16"')

    limited = "import resource\nfrom soka_serve.cli import main\n"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\nmain()"
    command = [preloaded.CODE, limited, "build", manifest, "--out", tmp_path / "build"]
    done = preloaded.run("soka", command, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "merged" in done.stderr
    assert (tmp_path / "build" / "small" / "merged" / "model.safetensors").read_bytes() == before
    assert [p.name for p in (tmp_path / "build").iterdir() if p.name not in (".cache", "small")] == []
    again = _build(manifest)
    assert again.exit_code == 0, again.output


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the embedded base."""
    base, folder = base_directory(), tmp_path_factory.mktemp("adapter") / "adapter"
    shape = Checkpoint.open(base).info(f"{Q_PROJ}.weight").shape
    return write_test_adapter(folder, {Q_PROJ: random_factors(*shape, 1, 0)}, base=base)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("out", ["models", "loras", "notes", ".", "..", "", "/proc/out", "/sys/out"])
@pytest.mark.parametrize("command", ["merge", "export", "extract"])
def test_folders_of_the_users_outlive_every_command(
    tmp_path: Path, adapter: Path, command: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models, adapters and notes, whose names end as those of outputs do."""
    here = tmp_path / "work" / "here"
    for model in ("a", "b"):
        shutil.copytree(base_directory(), here / "models" / model)
    shutil.copytree(adapter, here / "loras" / "one")
    (here / "notes").mkdir()
    (here / "notes" / "notes.md").write_text("mine")
    (here / "notes" / "results.json").write_text("{}")
    before = _contents(tmp_path)
    arguments = {
        "merge": ["merge", adapter, "--base", "tiny", "--no-verify"],
        "export": ["export", adapter],
        "extract": ["extract", "models/a", "--base", "models/b", "--rank", "1"],
    }[command]
    monkeypatch.chdir(here)
    done = CliRunner().invoke(main, [*map(str, arguments), "--out", out])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert "bug" not in done.output
    models = "would destroy models/" if command == "extract" else "a/, b/"  # inputs are named first
    named = {"models": models, "loras": "one/", "notes": "notes.md, results.json", "": "is empty"}
    assert named.get(out, "cannot write" if not out.startswith("..") else "") in done.output
    assert _contents(tmp_path) == before
