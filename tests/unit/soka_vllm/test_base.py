"""An adapter's soka.lock against the weights that are served."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
from pathlib import Path

import pytest

from soka_serve.base.checkpoint import Checkpoint
from soka_serve.builtin import base_directory
from soka_serve.io.lockfile import write_lock
from soka_serve.io.own_cache import cache_directory
from soka_serve.io.workspace import HashCache
from soka_vllm import base
from soka_vllm.base import check_base
from tests.fuzzing.limits import limited

OTHER = "0" * 64


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(base.ALLOW_VARIABLE, raising=False)
    monkeypatch.setattr(base, "_hashes", {})
    caplog.set_level(logging.INFO, "vllm.soka")


@pytest.fixture
def served(tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_directory(), tmp_path / "served"))


def adapter(tmp_path: Path, sha256: str, *, beside: bool = False) -> Path:
    folder = tmp_path / "build" / "name" / "adapter"
    folder.mkdir(parents=True)
    write_lock((folder.parent if beside else folder) / "soka.lock", {"base": {"name": "x", "sha256": sha256}})
    return folder


@pytest.mark.parametrize("beside", [False, True])
def test_its_own_base(tmp_path: Path, served: Path, beside: bool) -> None:
    check_base(adapter(tmp_path, Checkpoint.open(served).sha256(), beside=beside), str(served), None)


@pytest.mark.parametrize("beside", [False, True])
def test_another_base_is_refused_with_both_hashes(tmp_path: Path, served: Path, beside: bool) -> None:
    folder = adapter(tmp_path, OTHER, beside=beside)
    with pytest.raises(ValueError, match=f"{OTHER}, the served base has {Checkpoint.open(served).sha256()}; "):
        check_base(folder, str(served), None)


def test_another_base_on_purpose(
    tmp_path: Path, served: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(base.ALLOW_VARIABLE, "1")
    check_base(adapter(tmp_path, OTHER), str(served), None)
    assert OTHER in caplog.text


def test_a_quantised_base_is_another_by_nature(tmp_path: Path, served: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((served / "config.json").read_text())
    (served / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    check_base(adapter(tmp_path, OTHER), str(served), None)
    assert "quantised" in caplog.text


def test_the_base_is_hashed_once(tmp_path: Path, served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again by the next server; a changed base is hashed anew."""
    folder = adapter(tmp_path, Checkpoint.open(served).sha256())
    check_base(folder, str(served), None)
    assert (cache_directory() / "hashes.json").is_file()
    asked = []
    read = HashCache.file
    monkeypatch.setattr(HashCache, "file", lambda self, path: asked.append(self.knows(path)) or read(self, path))
    check_base(folder, str(served), None)
    assert asked == []
    monkeypatch.setattr(base, "_hashes", {})
    check_base(folder, str(served), None)
    assert asked == [True]
    monkeypatch.setattr(base, "_hashes", {})
    with (served / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ValueError, match="the served base has"):
        check_base(folder, str(served), None)
    assert asked == [True, False]


def forged(served: Path, digest: str = OTHER) -> str:
    """A cache that says of the served weights what its writer wants."""
    file = (served / "model.safetensors").resolve()
    status = file.stat()
    return json.dumps({str(file): [status.st_size, status.st_mtime_ns, status.st_ino, digest]})


@pytest.mark.parametrize("kind", ["pipe", "forged", "list", "device"])
def test_what_lies_beside_an_adapter_is_not_read(tmp_path: Path, served: Path, kind: str) -> None:
    """Where a build would keep its cache: whoever brings the adapter can have written that."""
    sha256 = Checkpoint.open(served).sha256()
    folder = adapter(tmp_path, sha256)
    planted = tmp_path / "build" / ".cache" / "hashes.json"
    planted.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(planted)
    elif kind == "device":
        planted.symlink_to("/dev/zero")
    else:
        planted.write_text(forged(served) if kind == "forged" else "[]")
    with limited(20):
        check_base(folder, str(served), None)


def test_the_cache_is_the_users_own(tmp_path: Path, served: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One that others could write to is dropped and closed; it costs reading the base again, and is said."""
    folder = adapter(tmp_path, Checkpoint.open(served).sha256())
    check_base(folder, str(served), None)
    cache = cache_directory()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    for open_to_others in (cache, cache / "hashes.json"):
        (cache / "hashes.json").write_text(forged(served))
        cache.chmod(0o755)
        open_to_others.chmod(0o777)
        base._hashes.clear()
        caplog.clear()
        check_base(folder, str(served), None)
        assert "other users may write" in caplog.text
        assert OTHER not in (cache / "hashes.json").read_text()
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    (cache / "hashes.json").unlink()
    (cache / "hashes.json").symlink_to("/dev/zero")
    base._hashes.clear()
    check_base(folder, str(served), None)
    assert (cache / "hashes.json").is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_cache_is_left_alone(tmp_path: Path, served: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = cache_directory()
    cache.mkdir(parents=True)
    (cache / "hashes.json").write_text(forged(served))
    os.chown(cache, 12345, 12345)
    check_base(adapter(tmp_path, Checkpoint.open(served).sha256()), str(served), None)
    assert "belongs to another user" in caplog.text
    assert OTHER in (cache / "hashes.json").read_text()


def test_the_lock_of_the_build_counts_where_nobody_else_can_write(tmp_path: Path, served: Path) -> None:
    folder = adapter(tmp_path, OTHER, beside=True)
    lock = folder.parent / "soka.lock"
    with pytest.raises(ValueError, match=OTHER):
        check_base(folder, str(served), None)
    for place in (lock, folder.parent):
        before = place.stat().st_mode
        place.chmod(0o777)
        check_base(folder, str(served), None)
        place.chmod(before)
    lock.unlink()
    os.mkfifo(lock)
    with limited(20):
        check_base(folder, str(served), None)


def test_no_lock_is_no_refusal(tmp_path: Path, served: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_base(tmp_path, str(served), None)
    assert "no soka.lock" in caplog.text


def test_a_base_that_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check_base(adapter(tmp_path, OTHER), "nobody/has-this", None)
    assert "cannot be compared" in caplog.text


def test_a_base_of_pickles_is_not_compared(tmp_path: Path, served: Path, caplog: pytest.LogCaptureFixture) -> None:
    (served / "model.safetensors").rename(served / "pytorch_model.bin")
    check_base(adapter(tmp_path, OTHER), str(served), None)
    assert "cannot be hashed" in caplog.text


def test_a_damaged_lock(tmp_path: Path, served: Path) -> None:
    (tmp_path / "soka.lock").write_text("base = [")
    with pytest.raises(ValueError, match="not TOML"):
        check_base(tmp_path, str(served), None)
