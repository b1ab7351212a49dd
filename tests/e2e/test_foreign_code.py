"""No command runs code that comes with a checkpoint, whatever is answered on the terminal."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import preloaded
from tests.support.planted import plant
from tests.support.tiny_models import random_factors, write_test_adapter

MANIFEST = """\
schema = 1
name = "m"
[base]
path = "base"
[[adapt]]
modules = ["q_proj"]
calibration_batches = 0
[train]
steps = 1
batch_size = 2
data = { builtin = "math", limit = 8 }
[output]
write = ["adapter", "merged"]
[eval]
limit = 2
max_new_tokens = 4
"""
SUITE = """\
schema = 1
name = "s"
base = { path = "base" }
train = { steps = 1, batch_size = 2 }
protocol = { seeds = [0], validation = 2, test = 2, max_new_tokens = 4 }
dataset = [{ name = "math", data = { builtin = "math", limit = 8 } }]
method = [{ name = "a", method = "lora", grid = { learning_rate = [1e-3] } }]
"""
# Everything that opens a model or tokenizer, called as the commands call it.
OPENERS = {
    "answers": "from soka_serve.base.pretrained import open_tokenizer\nopen_tokenizer(base)",
    "training": "from soka_serve.base.model import load_base\nload_base(base)",
    "verify": "from soka_serve.adapter.format import Adapter\n"
    "from soka_serve.compiler.merge.verify import verify_logits\n"
    "verify_logits(base, base, Adapter(Path('adapter'), {}, {}, {}))",
    "eval, transformers": """\
from soka_serve.evaluation.backends import TransformersBackend
from soka_serve.evaluation.subject import Subject
from soka_serve.manifest.read import read_manifest
from soka_serve.serving.targets import Target
target = Target(given='m', name='m', kind='merged', path=base)
subject = Subject(read_manifest('m.toml').manifest, target, base, base, 64)
with TransformersBackend(subject, batch_size=1).roles() as ask, ask('merged'):
    pass""",
    "eval, vllm": """\
from soka_serve.evaluation.models import ServedModel
from soka_serve.serving.command import Launch
ServedModel(Launch(()), 'm', base, 64, 1)""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A manifest, a suite and an adapter for the base in `base`, which a test makes."""
    (tmp_path / "m.toml").write_text(MANIFEST)
    (tmp_path / "s.toml").write_text(SUITE)
    write_test_adapter(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": random_factors(128, 128, 1, 0)})
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m` or `python -c`, with "y" as the answer to every question."""
    environment = {"XDG_CACHE_HOME": str(folder / "cache")}
    return preloaded.run("soka", arguments, cwd=folder, env=environment, answers="y\n" * 100)


def is_refused(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    said = done.stderr + done.stdout
    assert not (folder / "mark").exists(), said
    assert "never runs code that comes with a checkpoint" in said, said
    assert "Do you wish to run" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "m.toml"],
        ["build", "m.toml"],
        ["compare", "s.toml", "--out", "r.json"],
        ["compare", "s.toml", "--dry-run"],
        ["serve", "base", "--dry-run"],
        ["serve", "adapter", "--base", "base", "--dry-run"],
        ["serve", "base", "--dry-run", "--", "--trust-remote-code"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_commands_refuse_before_they_begin(folder: Path, arguments: list[str], part: str) -> None:
    plant(folder / "base", folder / "mark", model=part == "model", tokenizer=part == "tokenizer")
    done = run(folder, "soka_serve", *arguments)
    assert done.returncode == 2, done.stderr
    is_refused(done, folder)
    assert "Traceback" not in done.stderr
    file = "config.json" if part == "model" else "tokenizer_config.json"
    assert f"base/{file}: auto_map names" in done.stderr
    assert not (folder / "build").exists() or not list((folder / "build").glob("m/*"))


@pytest.mark.slow
def test_merge_does_not_load_what_needs_its_own_code(folder: Path) -> None:
    plant(folder / "base", folder / "mark")
    done = run(folder, "soka_serve", "merge", "adapter", "--base", "base", "--out", "merged")
    assert done.returncode == 0, done.stderr  # tensors are added, and verified, without any code
    assert "ulp of base + delta" in done.stdout
    assert "nats" not in done.stdout
    logits = "from soka_serve.compiler.merge.merge import merge\nfrom pathlib import Path\n"
    logits += "merge(Path('adapter'), base=Path('base'), out=Path('other'), verify='logits')"
    done = run(folder, "-c", logits)
    assert "CheckpointError" in done.stderr
    assert "base/config.json: auto_map names" in done.stderr
    assert not (folder / "other").exists()
    assert (folder / "merged" / "model.safetensors").exists()
    assert run(folder, "soka_serve", "inspect", "base").returncode == 0
    assert not (folder / "mark").exists()


@pytest.mark.slow
@pytest.mark.parametrize("opener", OPENERS)
def test_every_opener_refuses(folder: Path, opener: str) -> None:
    plant(folder / "base", folder / "mark")
    done = run(folder, "-c", f"from pathlib import Path\nbase = Path('base')\n{OPENERS[opener]}")
    assert done.returncode != 0
    assert not (folder / "mark").exists(), done.stderr
    assert "Do you wish to run" not in done.stdout
    assert "auto_map names" in done.stderr or "contains custom code" in done.stderr


@pytest.mark.slow
def test_a_native_architecture_is_loaded_by_transformers_own_class(folder: Path) -> None:
    """Many checkpoints still name the code that they had before transformers knew them."""
    plant(folder / "base", folder / "mark", native=True)
    (folder / "m.toml").write_text(MANIFEST.replace('["adapter", "merged"]', '["merged"]'))  # what eval then measures
    done = run(folder, "soka_serve", "build", "m.toml")
    assert done.returncode == 0, done.stderr
    assert (folder / "build" / "m" / "merged").is_dir()
    for opener in ("eval, vllm", "eval, transformers"):
        done = run(folder, "-c", f"from pathlib import Path\nbase = Path('base')\n{OPENERS[opener]}")
        assert done.returncode == 0, done.stderr
    assert not (folder / "mark").exists()
    # Later the merged model's files name code that it cannot do without.
    plant(folder / "build" / "m" / "merged", folder / "mark")
    for arguments in (["eval", "m.toml", "--backend", "transformers"], ["eval", "m.toml"]):
        done = run(folder, "soka_serve", *arguments, "--tasks", "soka_builtin_math", "--limit", "2")
        assert done.returncode == 2, done.stderr
        is_refused(done, folder)
    done = run(folder, "soka_serve", "serve", "build/m/merged", "--dry-run")
    assert done.returncode == 2, done.stderr
    is_refused(done, folder)
