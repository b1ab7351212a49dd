"""Merges that must fail whole, and merges that were killed."""

from __future__ import annotations

import errno
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

from soka_serve.adapter import source as adapter_source
from soka_serve.base.base import Base
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.compiler.merge import layout as merge_layout
from soka_serve.compiler.merge import merge as merging
from soka_serve.compiler.merge.merge import merge
from soka_serve.errors import BuildError, CheckpointError
from soka_serve.io.leftovers import stale_bytes
from soka_serve.io.lockfile import read_lock
from soka_serve.kron import Factors
from tests.support.tiny_models import merge_quietly as run
from tests.support.tiny_models import random_factors, write_base, write_test_adapter

Q = "model.layers.0.self_attn.q_proj"


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

real, base, adapter, out = merge_resume.MergeJournal.add, *map(Path, sys.argv[1:])

def add(self, new, name, digest):
    real(self, new, name, digest)
    if len(self.files) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

merge_resume.MergeJournal.add = add
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


@pytest.mark.parametrize("weights", [[], [float("nan")], [float("inf")]])
def test_nothing_to_merge(tmp_path: Path, base: Path, adapter: Path, weights: list[float]) -> None:
    with pytest.raises(CheckpointError, match="is not a finite number" if weights else "no adapter to merge"):
        merge([(adapter, weight) for weight in weights], base=base, out=tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("delta", "ulp of torch.bfloat16 from base"),
        ("other", "not adapted, yet changed by the merge"),
        ("logits", "log-probabilities differ by up to"),
    ],
)
def test_verification_can_fail(
    tmp_path: Path, base: Path, adapter: Path, damage: str, message: str, monkeypatch: pytest.MonkeyPatch, old: Any
) -> None:
    """A merge that writes a wrong value is caught before it replaces anything."""
    from soka_serve.compiler.merge import files as merge_files
    from soka_serve.compiler.merge import stream as merge_stream

    real = merge_stream.Terms.add_to

    def wrong(self: merge_stream.Terms, block: torch.Tensor, first: int) -> None:
        real(self, block, first)
        if damage == "delta":
            block += 2e-2 * block.abs()  # a little wrong everywhere
        else:
            block[10:20] += 0.05  # not among the sampled rows: only the logits can tell

    def zeros(self: merge_files.Writer, base: merge_files.Reader, start: int, size: int) -> None:
        base.read(start, size)
        self.append(memoryview(bytearray(size)))

    if damage == "other":
        monkeypatch.setattr(merge_files.Writer, "append_copy", zeros)
    else:
        monkeypatch.setattr(merge_stream.Terms, "add_to", wrong)
    if damage == "logits":
        monkeypatch.setattr("soka_serve.compiler.merge.verify._SAMPLED_ROWS", 1)
    with pytest.raises(BuildError, match=message):
        run(adapter, base, tmp_path / "out", verify="auto")
    old()


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
