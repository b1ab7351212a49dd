"""Build folders: lock, caches, remembered hashes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from soka_serve.errors import BuildError, CheckpointError
from soka_serve.io.files import sha256_file
from soka_serve.io.workspace import HashCache, Workspace, link_tree


def test_two_builds_of_one_name_exclude_each_other(tmp_path: Path) -> None:
    with Workspace(tmp_path, "a").locked():
        with pytest.raises(BuildError, match="another build of 'a'"), Workspace(tmp_path, "a").locked():
            pass
        with Workspace(tmp_path, "b").locked():
            pass
    with Workspace(tmp_path, "a").locked():
        pass


def test_a_killed_build_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from soka_serve.io.workspace import Workspace\n"
        f"with Workspace(Path({str(tmp_path)!r}), 'a').locked(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with Workspace(tmp_path, "a").locked():
        pass


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    cache = HashCache(tmp_path / "hashes.json")
    assert not cache.knows(file)
    assert cache.file(file) == sha256_file(file)
    cache.save()
    again = HashCache(tmp_path / "hashes.json")
    assert again.knows(file)
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert not again.knows(file)
    assert again.file(file) == sha256_file(file)


DIGEST = "0" * 64


@pytest.mark.parametrize(
    "text",
    [
        '{"half',
        "[]",
        "3",
        "null",
        '"text"',
        "[" * 100_000,
        '{"FILE": null}',
        '{"FILE": []}',
        '{"FILE": [1, 2, 3]}',
        '{"FILE": [1, 2, 3, 4]}',
        '{"FILE": {"0": 1}}',
        '{"FILE": ["STAMP", "x"]}',
        '{"FILE": [STAMP, "FFFF"]}',
        '{"FILE": [STAMP, null]}',
        '{"FILE": [STAMP, "' + DIGEST + '", 1]}',
        '{"FILE": [' + "9" * 10_000 + ', 1, 2, "' + DIGEST + '"]}',
        '{"FILE": [true, true, true, "' + DIGEST + '"]}',
        "\ud800",
    ],
)
def test_garbage_among_the_hashes_is_ignored(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    stamp = f"{file.stat().st_size}, {file.stat().st_mtime_ns}, {file.stat().st_ino}"
    content = text.replace("FILE", str(file)).replace("STAMP", stamp)
    (tmp_path / "hashes.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    cache = HashCache(tmp_path / "hashes.json")
    assert "hashes.json" in caplog.text
    assert not cache.knows(file)
    assert cache.file(file) == sha256_file(file)
    cache.save()
    assert HashCache(tmp_path / "hashes.json").knows(file)


@pytest.mark.parametrize("what", ["pipe", "folder", "sparse", "device", "loop"])
def test_what_is_no_file_of_hashes_is_not_read(tmp_path: Path, what: str) -> None:
    file, path = tmp_path / "weights", tmp_path / "hashes.json"
    file.write_bytes(b"one")
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "sparse":
        with path.open("wb") as stream:
            stream.truncate(4 << 40)  # which nobody has the memory for
    else:
        path.symlink_to("/dev/zero" if what == "device" else path)
    cache = HashCache(path)
    assert cache.file(file) == sha256_file(file)
    cache.save()
    assert file.read_bytes() == b"one"
    if what == "sparse":
        assert HashCache(path).knows(file)


@pytest.mark.parametrize("text", ["mine", '{"mine": 1}', "[]"])
def test_what_a_link_leads_to_is_not_overwritten(tmp_path: Path, text: str) -> None:
    """Unless it is a cache: somebody may keep theirs elsewhere."""
    file, path, other = tmp_path / "weights", tmp_path / "hashes.json", tmp_path / "other"
    file.write_bytes(b"one")
    other.write_text(text)
    path.symlink_to(other)
    for _ in range(2):
        cache = HashCache(path)
        assert cache.file(file) == sha256_file(file)
        cache.save()
        assert other.read_text() == text
    other.write_text("{}")
    cache = HashCache(path)
    cache.file(file)
    cache.save()
    assert path.is_symlink()
    assert HashCache(path).knows(file)


def test_files_that_change_after_they_were_hashed(tmp_path: Path) -> None:
    cache = HashCache(tmp_path / "hashes.json")
    one, two = tmp_path / "one", tmp_path / "two"
    for file in (one, two):
        file.write_bytes(b"1")
        cache.file(file)
    os.utime(one, (1, 1))  # what it holds is the same
    cache.check_unchanged()
    two.write_bytes(b"2")
    cache.file(two)
    with pytest.raises(CheckpointError, match=r"two: was changed while it was being read"):
        cache.check_unchanged()
    two.unlink()
    with pytest.raises(CheckpointError, match=r"two: was changed"):
        cache.check_unchanged()


def test_old_caches_go_and_the_current_ones_stay(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "a")
    with workspace.locked():
        for stage, key in (("init", "1"), ("init", "2"), ("tune", "1")):
            workspace.stage(stage, key).mkdir()
        workspace.forget_others({"init": "2", "tune": "1"})
        assert sorted(p.name for p in workspace.cache.iterdir()) == ["init-2", "lock", "tune-1"]


def test_another_programs_cache_stays(tmp_path: Path) -> None:
    """With the home directory as folder of builds, a build called huggingface meets ~/.cache/huggingface."""
    workspace = Workspace(tmp_path, "huggingface")
    names = ["hub/models--a--b/x.safetensors", "token", "init-zz/x", "tune-1.bak/x", "xinit-1/x"]
    for name in names:
        (workspace.cache / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace.cache / name).write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (workspace.cache / "tune-5").symlink_to(tmp_path / "elsewhere")
    with workspace.locked():
        workspace.stage("init", "1").mkdir()
        (workspace.cache / ".init-2.tmp-1-000000-000000").mkdir()
        os.utime(workspace.cache / ".init-2.tmp-1-000000-000000", (1, 1))
        workspace.forget_others({"init": "2"})
    assert all((workspace.cache / name).read_text() == "mine" for name in names)
    assert (workspace.cache / "tune-5").is_symlink()
    assert not (workspace.cache / "init-1").exists()
    assert not list(workspace.cache.glob(".init-*"))  # a killed run's


def test_link_tree_gives_second_names(tmp_path: Path) -> None:
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "sub" / "file").write_text("x")
    link_tree(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "sub" / "file").read_text() == "x"
    assert (tmp_path / "b" / "sub" / "file").samefile(tmp_path / "a" / "sub" / "file")
