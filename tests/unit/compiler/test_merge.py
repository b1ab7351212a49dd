"""Merges that must fail whole, and what a merged directory holds."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from soka_serve.adapter import source as adapter_source
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.opened import Base
from soka_serve.compiler.merge import layout as merge_layout
from soka_serve.compiler.merge import merge as merging
from soka_serve.compiler.merge.merge import merge
from soka_serve.errors import BuildError, CheckpointError
from soka_serve.io import files
from soka_serve.io.leftovers import stale_bytes
from soka_serve.io.lockfile import read_lock, write_lock
from soka_serve.kron import Factors
from tests.support.tiny_models import SHAPES, all_factors, random_factors, write_base, write_test_adapter

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("merge") / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return write_test_adapter(tmp_path / "adapter", base=base)


@pytest.fixture
def old(tmp_path: Path) -> Callable[[], None]:
    """An earlier merged model in tmp_path/out; the function checks that it is still there, and nothing else is."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    write_lock(out / "soka.lock", {"soka": 1, "kind": "merged"})

    def check() -> None:
        assert sorted(p.name for p in out.iterdir()) == ["config.json", "soka.lock"]
        assert (out / "config.json").read_text() == "old"
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]

    return check


def run(adapter: Path, base: Path, out: Path, **options: object) -> None:
    merge(adapter, base=base, out=out, progress=False, **{"verify": False, **options})  # type: ignore[arg-type]


def test_what_a_merged_directory_holds(
    tmp_path: Path, base: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for stray in ("pytorch_model.bin", "optimizer.pt", "modeling_custom.py", "notes.parquet"):
        (base / stray).write_text("x")
    try:
        with caplog.at_level(logging.INFO):
            result = merge(adapter, base=base, out=tmp_path / "out", verify="tensors", progress=False)
    finally:
        for stray in ("pytorch_model.bin", "optimizer.pt", "modeling_custom.py", "notes.parquet"):
            (base / stray).unlink()
    assert "not copied from the base: modeling_custom.py, notes.parquet, optimizer.pt, pytorch_model.bin" in caplog.text
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {p.name for p in base.iterdir()} | {"soka.lock", "README.md"}
    assert "generation_config.json" in names
    for name in names - {"soka.lock", "README.md"}:
        if not name.endswith(".safetensors") and "index" not in name:
            assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
    opened = Checkpoint.open(tmp_path / "out")
    original = Checkpoint.open(base)
    assert len(opened.files) > 2
    assert [(t.name, t.dtype, t.shape, t.start) for t in opened.tensors.values()] == [
        (t.name, t.dtype, t.shape, t.start) for t in original.tensors.values()
    ]
    lock = read_lock(tmp_path / "out" / "soka.lock")
    assert lock["base"]["sha256"] == original.sha256()
    assert lock["adapters"]["adapter0"]["modules"] == len(all_factors())
    for name in ("soka.lock", "README.md"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()
    assert result.modules == 14
    assert result.tensors == len(original.tensors)
    assert result.bytes_written == sum(f.stat().st_size for f in opened.files)
    assert "verified    weights within 0." in result.to_text()


def test_the_same_adapter_twice_is_listed_twice(tmp_path: Path, base: Path, adapter: Path) -> None:
    merge([(adapter, 0.5), (adapter, 0.25)], base=base, out=tmp_path / "out", progress=False)
    listed = read_lock(tmp_path / "out" / "soka.lock")["adapters"]
    assert [entry["weight"] for entry in listed.values()] == [0.5, 0.25]


def test_merge_again_gives_the_same_bytes(tmp_path: Path, base: Path, adapter: Path) -> None:
    run(adapter, base, tmp_path / "out")
    before = Checkpoint.open(tmp_path / "out").sha256()
    run(adapter, base, tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").sha256() == before != Checkpoint.open(base).sha256()


def test_single_file_without_index(tmp_path: Path, adapter: Path) -> None:
    base = write_base(tmp_path / "one", shard="1GB")
    run(adapter, base, tmp_path / "out", allow_other_base=True)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_other_base(tmp_path: Path, base: Path, adapter: Path, old: Callable[[], None]) -> None:
    other = write_base(tmp_path / "other", seed=7)
    with pytest.raises(CheckpointError, match=r"made for base weights with sha256 [0-9a-f]{12}") as caught:
        run(adapter, other, tmp_path / "out")
    assert "--allow-other-base" in str(caught.value.hint)
    old_names = {p.name for p in tmp_path.iterdir()}
    assert old_names == {"adapter", "other", "out"}
    run(adapter, other, tmp_path / "out", allow_other_base=True)
    assert "sha256" not in read_lock(tmp_path / "out" / "soka.lock")["base"]


def test_the_lock_of_the_build_counts_too(tmp_path: Path, base: Path) -> None:
    adapter = write_test_adapter(tmp_path / "build" / "adapter", base=base)
    (adapter / "soka.lock").rename(adapter.parent / "soka.lock")
    with pytest.raises(CheckpointError, match="made for base weights"):
        run(adapter, write_base(tmp_path / "other", seed=7), tmp_path / "out")
    run(adapter, base, tmp_path / "out")


def test_adapter_that_does_not_fit(tmp_path: Path, base: Path, old: Callable[[], None]) -> None:
    factors = {
        "model.layers.7.self_attn.q_proj": random_factors(64, 64, 1, 0),
        "model.layers.1.mlp.up_proj": random_factors(64, 64, 1, 0),
        Q: random_factors(64, 64, 1, 0),
    }
    adapter = write_test_adapter(tmp_path / "adapter", factors)
    with pytest.raises(CheckpointError) as caught:
        run(adapter, base, tmp_path / "out")
    lines = caught.value.message.splitlines()
    assert len(lines) == 2
    assert any("layers.7.self_attn.q_proj" in line for line in lines)
    assert any("up_proj" in line and "(96, 64)" in line for line in lines)
    old()


def test_tied_head(tmp_path: Path, old: Callable[[], None]) -> None:
    base = write_base(tmp_path / "tied", tied=True)
    adapter = write_test_adapter(tmp_path / "adapter", {"lm_head": random_factors(96, 64, 1, 0)})
    with pytest.raises(CheckpointError, match="lm_head"):
        run(adapter, base, tmp_path / "out")
    old()


def test_untied_head(tmp_path: Path, base: Path) -> None:
    adapter = write_test_adapter(tmp_path / "adapter", {"lm_head": random_factors(96, 64, 1, 0)})
    result = merge(adapter, base=base, out=tmp_path / "out", verify="tensors", progress=False)
    assert result.modules == 1


@pytest.mark.parametrize("what", ["nan in the base", "overflow", "conversion"])
def test_values_that_are_not_finite(tmp_path: Path, what: str, old: Callable[[], None]) -> None:
    base = write_base(tmp_path / "base", dtype=torch.float32, shard="1GB")
    factors = {Q: random_factors(64, 64, 1, 0)}
    tensors = load_file(base / "model.safetensors")
    if what == "nan in the base":
        tensors[f"{Q}.weight"][3, 5] = float("nan")
        message = f"{Q}.weight holds values that are NaN or infinite"
    elif what == "overflow":
        factors[Q] = Factors(factors[Q].left, factors[Q].right, torch.tensor([1e6]))
        message = rf"{Q}\.weight: base \+ delta reaches .*e\+06, too large for float16"
    else:
        tensors["lm_head.weight"][0, 0] = 7e4
        message = r"lm_head\.weight: base \+ delta reaches 7e\+04, too large for float16"
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        run(write_test_adapter(tmp_path / "adapter", factors), base, tmp_path / "out", dtype="float16")
    old()


def test_quantised_base(tmp_path: Path, adapter: Path, old: Callable[[], None]) -> None:
    base = write_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(CheckpointError, match="quantised"):
        run(adapter, base, tmp_path / "out")
    old()


def test_disk_full(tmp_path: Path, base: Path, adapter: Path, old: Callable[[], None]) -> None:
    """A limit on file sizes stops a shard before anything is written to it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, before[1]))
    try:
        with pytest.raises(BuildError, match=r"cannot write .*out: File too large"):
            run(adapter, base, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    old()


@pytest.mark.parametrize("direct", [False, True])
def test_disk_full_in_the_middle(
    tmp_path: Path, base: Path, adapter: Path, old: Callable[[], None], monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """Other files are in work then, and are given up; no descriptor stays open."""
    from soka_serve.compiler.merge import files as merge_files

    real, calls = merge_files.Writer._pwrite, 0

    def full(self: merge_files.Writer, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data[:4096], offset)  # and fewer bytes than asked for

    monkeypatch.setattr("soka_serve.compiler.merge.layout.MergeLayout.fits_memory", lambda layout: not direct)
    monkeypatch.setattr("soka_serve.compiler.merge.files._DIRECT_BYTES", 8192)
    monkeypatch.setattr(merge_files.Writer, "_pwrite", full)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(BuildError, match=r"cannot write .*out: No space left on device"):
        run(adapter, base, tmp_path / "out")
    assert calls > 5
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    old()


KILLED = """
import os, signal, sys
from pathlib import Path
from soka_serve.compiler.merge import resume as merge_resume
from soka_serve.compiler.merge.merge import merge

real, base, adapter, out = merge_resume.Finished.add, *map(Path, sys.argv[1:])

def add(self, new, name, digest):
    real(self, new, name, digest)
    if len(self.files) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

merge_resume.Finished.add = add
merge(adapter, base=base, out=out, verify=False, progress=False)
"""


@pytest.mark.parametrize("change", ["nothing", "weight", "base"])
def test_a_killed_merge_goes_on(
    tmp_path: Path, adapter: Path, base: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was finished is taken over if everything is as it was, and the result is that of one run."""
    own = tmp_path / "base"
    shutil.copytree(base, own)
    shards = Checkpoint.open(own).files
    assert len(shards) > 2
    command = [sys.executable, "-c", KILLED, str(own), str(adapter), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = (p for p in tmp_path.iterdir() if p.name.startswith(".out."))
    assert not (tmp_path / "out").exists()
    room = sum(f.stat().st_size for f in shards)
    assert 0 < stale_bytes(tmp_path / "out") < room + 2**20
    full = SimpleNamespace(free=room - stale_bytes(tmp_path / "out") // 2)  # it has room, as what is left counts
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    if change == "base":
        os.utime(shards[-1], (1, 1))
    written: list[str] = []

    def watched(target: Path, *rest: Any, **options: Any) -> None:
        written.append(target.name)
        write_file(target, *rest, **options)

    write_file = merge_layout.write_file
    monkeypatch.setattr(merge_layout, "write_file", watched)
    weights = [(adapter, 0.5 if change == "weight" else 1.0)]
    merge(weights, base=own, out=tmp_path / "out", verify="tensors", progress=False)
    assert len(written) == len(shards) - 2 * (change == "nothing")
    assert not left.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "base", "out"}
    assert not list((tmp_path / "out").glob(".*"))
    monkeypatch.undo()
    monkeypatch.setattr(merge_layout, "write_file", watched)
    written.clear()
    merge(weights, base=own, out=tmp_path / "again", verify=False, progress=False)
    assert len(written) == len(shards)
    for file in (*(f.name for f in shards), "soka.lock"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_several_damaged_shards(tmp_path: Path, adapter: Path, old: Callable[[], None]) -> None:
    """What is raised is what is wrong with one of them, not that others were stopped for it."""
    base = write_base(tmp_path / "damaged")
    for file in Checkpoint.open(base).files:
        save_file({n: torch.full_like(t, torch.nan) for n, t in load_file(file).items()}, file)
    for _ in range(5):
        with pytest.raises(CheckpointError, match="values that are NaN or infinite"):
            run(adapter, base, tmp_path / "out", allow_other_base=True)
    old()


def test_no_room(
    tmp_path: Path, base: Path, adapter: Path, old: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(BuildError, match=r"takes [\d,]+ bytes, the disk has 1,000 free"):
        run(adapter, base, tmp_path / "out")
    old()


def test_base_that_shrinks_meanwhile(tmp_path: Path, adapter: Path) -> None:
    base = Base(write_base(tmp_path / "base", shard="1GB"))
    file = base.checkpoint.files[0]
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"truncated|ended early"):
        merging.MergeRun([(adapter, 1.0)], base, tmp_path / "out", allow_other_base=True, progress=False).run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weight_that_is_no_number(tmp_path: Path, base: Path, adapter: Path, weight: float) -> None:
    with pytest.raises(CheckpointError, match="is not a finite number"):
        merge([(adapter, weight)], base=base, out=tmp_path / "out", progress=False)


def test_no_adapter(tmp_path: Path, base: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter to merge"):
        merge([], base=base, out=tmp_path / "out")


def test_inputs_are_safe(tmp_path: Path, base: Path, adapter: Path) -> None:
    for out in (base, adapter, adapter.parent):
        with pytest.raises(BuildError, match="would destroy"):
            run(adapter, base, out)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").touch()
    with pytest.raises(BuildError, match=r"no soka\.lock in it says that it is a merged model.*holds main\.tex"):
        run(adapter, base, tmp_path / "thesis")


def _everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("what", ["models", "a model", "adapters", "notes", "results", "a link", "a lock of a build"])
def test_what_is_no_merged_model_is_refused_before_any_work(
    tmp_path: Path, base: Path, adapter: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files with a merged model's endings, and even with its names, are not a merged model."""
    out = tmp_path / "mine"
    out.mkdir()
    if what == "models":
        shutil.copytree(base, out / "a")
        shutil.copytree(base, out / "b")
    elif what == "a model":
        shutil.copytree(base, out, dirs_exist_ok=True)
    elif what == "adapters":
        shutil.copytree(adapter, out / "one")
    elif what == "notes":
        (out / "notes.md").write_text("mine")
        (out / "results.json").write_text("{}")
    elif what == "results":
        (out / "config.json").write_text("{}")
    elif what == "a link":
        (out / "model.safetensors").symlink_to(base / "config.json")
    else:
        write_lock(out / "soka.lock", {"soka": 1, "stages": {}, "files": {}})
    before = _everything(out)
    monkeypatch.setattr(merging, "read_source", lambda _: pytest.fail("work was begun"))
    first = sorted(p.name for p in out.iterdir())[0]
    with pytest.raises(BuildError, match=r"no soka\.lock in it says that it is a merged model") as caught:
        run(adapter, base, out)
    assert first in caught.value.message
    assert _everything(out) == before


@pytest.mark.parametrize(
    "added", ["notes.md", "vocabulary.json", "a/config.json", "adapter_config.json", "extra.safetensors", "empty/"]
)
def test_what_was_put_into_a_merged_model_is_not_lost(tmp_path: Path, base: Path, adapter: Path, added: str) -> None:
    out = tmp_path / "out"
    run(adapter, base, out)
    run(adapter, base, out)  # an earlier output of the same kind is replaced
    (out / ".DS_Store").touch()
    run(adapter, base, out)
    (out / added).parent.mkdir(exist_ok=True)
    (out / added).mkdir() if added.endswith("/") else (out / added).write_text("mine")
    before = _everything(out)
    with pytest.raises(BuildError, match=f"not part of a merged model: {added.split('/')[0]}"):
        run(adapter, base, out)
    assert _everything(out) == before


@pytest.mark.parametrize("named", ["*", "notes.*", "notes.md", "[n]otes.md", "../out/notes.md", "*.safetensors"])
def test_an_index_does_not_make_files_a_merged_models_own(
    tmp_path: Path, base: Path, adapter: Path, named: str
) -> None:
    out = tmp_path / "out"
    run(adapter, base, out)
    mine = out / ("mine.safetensors" if named == "*.safetensors" else "notes.md")
    mine.write_text("mine")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"]["more"] = named
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BuildError, match=f"not part of a merged model: {mine.name}"):
        run(adapter, base, out)
    assert mine.read_text() == "mine"


def test_a_merged_model_of_other_files_is_replaced(tmp_path: Path, base: Path, adapter: Path) -> None:
    """Its own index says which weights are its own."""
    single = write_base(tmp_path / "single", shard="1GB")
    run(adapter, base, tmp_path / "out")
    run(adapter, single, tmp_path / "out", allow_other_base=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    run(adapter, base, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("what", ["added", "changed", "a new folder"])
def test_what_comes_while_a_merge_runs_is_kept(
    tmp_path: Path,
    base: Path,
    adapter: Path,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("soka_serve"), "propagate", True)
    out = tmp_path / "out"
    if what != "a new folder":
        run(adapter, base, out)
    real = merging.write_papers

    def meanwhile(*args: Any) -> None:
        out.mkdir(exist_ok=True)
        (out / {"changed": "README.md"}.get(what, "notes.md")).write_text("mine")
        real(*args)

    monkeypatch.setattr(merging, "write_papers", meanwhile)
    run(adapter, base, out)
    (kept,) = tmp_path.glob("out.earlier-*")
    assert (kept / {"changed": "README.md"}.get(what, "notes.md")).read_text() == "mine"
    assert Checkpoint.open(out).sha256() != Checkpoint.open(base).sha256()
    assert "mine" not in (out / "README.md").read_text()
    assert str(kept) in caplog.text


@pytest.mark.parametrize("where", ["here", "above here", "home", "root"])
def test_places_that_are_never_replaced(
    tmp_path: Path, base: Path, adapter: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, home = tmp_path / "work" / "here", tmp_path / "home"
    for folder in (here, home):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    out = {"here": Path(), "above here": Path(".."), "home": home, "root": Path("/")}[where]
    with pytest.raises(BuildError, match=r"current directory|home directory|would destroy"):
        run(adapter, base, out)
    assert here.is_dir()
    assert home.is_dir()


@pytest.mark.parametrize("place", ["/proc/merged", "/sys/merged", "/proc/self/merged"])
def test_places_that_are_the_kernels(base: Path, adapter: Path, place: str) -> None:
    with pytest.raises(BuildError, match=r"lies in /(proc|sys), which is the kernel's"):
        run(adapter, base, Path(place))


@pytest.mark.parametrize("damage", ["delta", "other", "logits"])
def test_verification_can_fail(
    tmp_path: Path, base: Path, adapter: Path, damage: str, monkeypatch: pytest.MonkeyPatch, old: Callable[[], None]
) -> None:
    """A merge that writes a wrong value is caught before it replaces anything."""
    from soka_serve.compiler.merge import files as merge_files
    from soka_serve.compiler.merge import stream as merge_stream

    real = merge_stream.Terms.add_to
    if damage == "delta":  # a little wrong everywhere

        def wrong(self: merge_stream.Terms, block: torch.Tensor, first: int) -> None:
            real(self, block, first)
            block += 2e-2 * block.abs()

        monkeypatch.setattr(merge_stream.Terms, "add_to", wrong)
        message = "ulp of torch.bfloat16 from base"
    elif damage == "other":

        def spoilt(self: merge_files.Writer, base: merge_files.Reader, start: int, size: int) -> None:
            base.read(start, size)
            self.append(memoryview(bytearray(size)))

        monkeypatch.setattr(merge_files.Writer, "append_copy", spoilt)
        message = "not adapted, yet changed by the merge"
    else:
        # Not among the sampled rows: only the logits can tell.
        from soka_serve.compiler.merge import verify as merge_verify

        monkeypatch.setattr(merge_verify, "_SAMPLED_ROWS", 1)

        def in_the_middle(self: merge_stream.Terms, block: torch.Tensor, first: int) -> None:
            real(self, block, first)
            block[10:20] += 0.05

        monkeypatch.setattr(merge_stream.Terms, "add_to", in_the_middle)
        message = "log-probabilities differ by up to"
    with pytest.raises(BuildError, match=message):
        run(adapter, base, tmp_path / "out", verify="auto")
    old()


def test_torch_threads_are_put_back(tmp_path: Path, base: Path, adapter: Path) -> None:
    before = torch.get_num_threads()
    run(adapter, base, tmp_path / "out")
    assert torch.get_num_threads() == before


def test_shapes_of_the_test_model(base: Path) -> None:
    opened = Checkpoint.open(base)
    for name, shape in SHAPES.items():
        assert opened.info(f"model.layers.0.{name}.weight").shape == shape


@pytest.mark.parametrize("metadata", ["null", "[]", "absent"])
def test_an_index_without_metadata(tmp_path: Path, metadata: str, caplog: pytest.LogCaptureFixture) -> None:
    """Merged all the same, with an index that transformers reads."""
    base = write_base(tmp_path / "base")
    adapter = write_test_adapter(tmp_path / "adapter", base=base)
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["metadata"]
    index.write_text(json.dumps(content | ({} if metadata == "absent" else {"metadata": json.loads(metadata)})))
    with caplog.at_level(logging.INFO):
        result = merge(adapter, base=base, out=tmp_path / "out", progress=False)
    assert result.verified == ("tensors",)
    assert "which transformers needs" in caplog.text
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert written["metadata"]["total_size"] > 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_index_of_more_and_less_than_there_is(tmp_path: Path) -> None:
    """Tied heads and buffers that no shard holds, a wrong shard, a tensor that is not named: the new index is right."""
    base = write_base(tmp_path / "base", tied=True)
    index = base / "model.safetensors.index.json"
    right = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(right.values()))
    wrong = {"lm_head.weight": shards[0], "model.layers.0.self_attn.rotary_emb.inv_freq": shards[0], **right}
    wrong[f"{Q}.weight"] = next(shard for shard in shards if shard != right[f"{Q}.weight"])
    del wrong["model.norm.weight"]
    index.write_text(json.dumps({"metadata": {}, "weight_map": wrong}))
    loaded, info = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    assert not info["missing_keys"]
    result = merge(write_test_adapter(tmp_path / "adapter"), base=base, out=tmp_path / "out", progress=False)
    assert result.verified == ("tensors", "logits")
    out = tmp_path / "out"
    written = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert written == right
    assert all(name in load_file(out / file) for name, file in written.items())
    tokens = torch.arange(9)[None]
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert not torch.allclose(merged(tokens).logits, loaded(tokens).logits)


def test_an_index_beside_a_single_file(tmp_path: Path) -> None:
    """The single file is read; the index that stays beside it names that one."""
    base = write_base(tmp_path / "base", shard="1GB")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00009.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    run(write_test_adapter(tmp_path / "adapter"), base, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(written) == set(Checkpoint.open(base).tensors)
    assert set(written.values()) == {"model.safetensors"}


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_nan_that_no_adapter_touches_is_the_bases(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    base = write_base(tmp_path / "base", shard="1GB")
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(-1)[:64] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    result = merge(write_test_adapter(tmp_path / "adapter"), base=base, out=tmp_path / "out", progress=False)
    assert "tensors" in result.verified
    after = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert torch.equal(after.view(torch.uint8), tensors[name].view(torch.uint8))
    assert f"holds NaN or infinity in {name}" in caplog.text
    assert str(base) in caplog.text
    assert "bug" not in caplog.text


@pytest.mark.parametrize("hashed", [True, False])
def test_a_base_that_cannot_be_read_is_named(
    tmp_path: Path, base: Path, hashed: bool, monkeypatch: pytest.MonkeyPatch, old: Callable[[], None]
) -> None:
    adapter = write_test_adapter(tmp_path / "adapter", base=base if hashed else None)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    monkeypatch.setattr(os, "copy_file_range", broken)
    with pytest.raises(
        CheckpointError, match=r"base/model-0000\d-of-0000\d\.safetensors: cannot be read: Input/output"
    ):
        run(adapter, base, tmp_path / "out")
    old()


def test_a_pipe_among_the_bases_files(tmp_path: Path, adapter: Path, old: Callable[[], None]) -> None:
    base = write_base(tmp_path / "base")
    (base / "vocab.json").unlink(missing_ok=True)
    os.mkfifo(base / "vocab.json")
    with pytest.raises(CheckpointError, match=r"vocab\.json: cannot be read: not a file but a device, a pipe"):
        run(adapter, base, tmp_path / "out")
    old()


@pytest.mark.parametrize("moment", ["while it is read", "while it is merged"])
def test_the_lock_names_the_adapter_that_was_merged(
    tmp_path: Path, base: Path, adapter: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of another training takes its place, as the end of a build does it."""
    other = write_test_adapter(tmp_path / "other", all_factors(seed=5), base=base)
    shas = {files.sha256_file(folder / "adapter_model.safetensors"): folder.name for folder in (adapter, other)}

    def swap() -> None:
        if other.exists():
            shutil.rmtree(adapter)
            other.rename(adapter)

    if moment == "while it is read":
        read = adapter_source.read_adapter
        monkeypatch.setattr(adapter_source, "read_adapter", lambda path: (read(path), swap())[0])
    else:
        papers = merging.copy_side_files
        monkeypatch.setattr(merging, "copy_side_files", lambda *args: (papers(*args), swap())[0])
    run(adapter, base, tmp_path / "out")
    named = shas[read_lock(tmp_path / "out" / "soka.lock")["adapters"]["adapter0"]["sha256"]]
    monkeypatch.undo()
    write_test_adapter(tmp_path / "own", all_factors(seed=1 if named == "adapter" else 5), base=base)
    run(tmp_path / "own", base, tmp_path / "again")
    assert named == ("other" if moment == "while it is read" else "adapter")
    for file in Checkpoint.open(base).files:
        assert (tmp_path / "out" / file.name).read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_an_adapter_that_changes_all_the_time(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, old: Callable[[], None]
) -> None:
    read, times = adapter_source.read_adapter, iter(range(1, 100))

    def touched(path: Path) -> object:
        found = read(path)
        os.utime(path / "adapter_config.json", (next(times),) * 2)
        return found

    monkeypatch.setattr(adapter_source, "read_adapter", touched)
    with pytest.raises(CheckpointError, match="is changed again and again while it is read"):
        run(adapter, base, tmp_path / "out")
    old()


def test_a_base_that_changes_while_it_is_merged(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, old: Callable[[], None]
) -> None:
    base = write_base(tmp_path / "base")
    real = merge_layout.write_file

    def changed(*args: Any, **options: Any) -> None:
        real(*args, **options)
        os.utime(Checkpoint.open(base).files[0], (1, 1))

    monkeypatch.setattr(merge_layout, "write_file", changed)
    with pytest.raises(CheckpointError, match=r"00001-of-.*was changed while it was being read"):
        run(adapter, base, tmp_path / "out")
    old()
