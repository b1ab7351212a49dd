"""Atomic files and directories: killed writers, full disks, things in the way."""

from __future__ import annotations

import errno
import os
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from soka_serve.errors import BuildError, CheckpointError, SokaError
from soka_serve.io import files, leftovers, places


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without renameat2."""
    monkeypatch.setattr(files, "_renameat2", lambda: None)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow past 64 KiB: writing more fails with EFBIG, as a full disk fails with ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_text_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "note.txt"
    files.write_text_atomic(path, "eins\n")
    files.write_text_atomic(path, "σ zwei\n")
    assert path.read_text() == "σ zwei\n"
    assert names(path.parent) == ["note.txt"]


@pytest.mark.parametrize("exchange", [True, False])
def test_directory_is_replaced_whole(tmp_path: Path, exchange: bool, request: pytest.FixtureRequest) -> None:
    if not exchange:
        request.getfixturevalue("no_exchange")
    target = tmp_path / "deep" / "out"
    with files.replace_directory(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()
    with files.replace_directory(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_text("2")
        assert names(target) == ["a"]
    assert names(target) == ["sub"]
    assert (target / "sub" / "b").read_text() == "2"
    assert names(target.parent) == ["out"]


def test_linux_has_the_exchange() -> None:
    assert (files._renameat2() is not None) == sys.platform.startswith("linux")


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    link.symlink_to(real)
    with files.replace_directory(link) as temporary:
        (temporary / "a").write_text("1")
    assert link.is_symlink()
    assert names(real) == ["a"]


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()])
def test_failure_leaves_the_old_directory(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(type(failure)), files.replace_directory(target) as temporary:  # noqa: PT012
        (temporary / "a").write_text("half")
        raise failure
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


KILLED = """
import sys, time
from pathlib import Path
from typing import Any
from soka_serve.io import files
if sys.argv[2] == "renames":
    files._renameat2 = lambda: None
    rename, done = Path.rename, []
    def stop_between(self, target):
        rename(self, target)
        print("ready", flush=True)
        time.sleep(60)
    Path.rename = stop_between
with files.replace_directory(Path(sys.argv[1])) as temporary:
    (temporary / "a").write_text("new")
    if sys.argv[2] == "body":
        print("ready", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("moment", ["body", "renames"])
def test_sigkill_leaves_the_old_directory(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(target), moment], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "ready\n"
        assert len(names(tmp_path)) == 2
        if moment == "body":
            assert (target / "a").read_text() == "old"
            assert leftovers.clean_stale(target) == []  # its process lives: hands off
        child.send_signal(signal.SIGKILL)
        child.wait()
    leftovers.clean_stale(target)
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_only_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    here, elsewhere = leftovers.machine_token(), "0" * 6
    dead = dead_pid()
    own, parent, container = os.getpid(), os.getppid(), here[:6] + "0" * 6
    gone = [
        f".out.tmp-9-{elsewhere}-00000a",
        f".out.tmp-{dead}-{here}-abcdef",
        f".out.tmp-{own}-{here}-abcdef",
        f".out.tmp-{parent}-{here}-00000b",  # the number belongs to another process now
        f".out.tmp-{parent}-{container}-abcdef",
    ]
    locked = [f".out.tmp-{parent}-{here}-abcdef", f".out.tmp-{dead}-{container}-00000c", f".out.old-1-{here}-00000d"]
    kept = [*locked, f".out.tmp-{dead}-{elsewhere}-abcdef", f".other.tmp-{dead}-{here}-aaaaaa"]
    for name in gone + kept:
        (tmp_path / name).mkdir()
    long_ago = time.time() - 3 * 24 * 3600
    os.utime(tmp_path / gone[0], (long_ago, long_ago))
    held = [os.open(tmp_path / name, os.O_RDONLY) for name in locked]
    try:
        assert all(leftovers.lock(descriptor) for descriptor in held)
        assert sorted(p.name for p in leftovers.clean_stale(target)) == sorted(gone)
        assert names(tmp_path) == sorted(kept)
    finally:
        for descriptor in held:
            os.close(descriptor)


def test_without_locks_process_ids_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where directories cannot be locked."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", refuse)
    here = leftovers.machine_token()
    gone = [f".out.tmp-{dead_pid()}-{here}-abcdef", f".out.tmp-{os.getpid()}-{here}-abcdef"]
    kept = [f".out.tmp-{os.getppid()}-{here}-abcdef", f".out.tmp-{dead_pid()}-{here[:6]}000000-abcdef"]
    for name in gone + kept:
        (tmp_path / name).mkdir()
    with files.replace_directory(tmp_path / "out") as temporary:
        assert names(tmp_path) == sorted([*kept, temporary.name])
        assert leftovers.clean_stale(tmp_path / "out") == []  # nor is what this process writes
    assert names(tmp_path) == sorted([*kept, "out"])


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_a_writer_in_another_container_lives(tmp_path: Path) -> None:
    """Another space of process ids, one host name and one folder: its number is that of no process here."""
    target, number = tmp_path / "out", dead_pid()
    python = shlex.join([sys.executable, "-c", KILLED, str(target), "body"])
    inside = f"echo {number - 1} > /proc/sys/kernel/ns_last_pid && {python}; exit 0"
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", inside]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            pytest.skip("namespaces cannot be made here")
        (left,) = tmp_path.iterdir()
        assert f".tmp-{number}-" in left.name
        assert leftovers.clean_stale(target) == []
        with files.replace_directory(target) as temporary:
            (temporary / "a").write_text("mine")
        assert left.is_dir()
        child.kill()
    wait_until(lambda: leftovers.clean_stale(target) == [left])
    assert names(tmp_path) == ["out"]


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_cleaner_that_comes_between_making_and_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir, made = Path.mkdir, 0

    def cleaned(self: Path, *args: object, **options: object) -> None:
        nonlocal made
        mkdir(self, *args, **options)  # type: ignore[arg-type]
        if ".out.tmp-" in self.name:
            made += 1
            if made == 1:
                self.rmdir()
                mkdir(self)

    real = os.open

    def replaced(path: str | Path, flags: int, *rest: object, **options: object) -> int:
        descriptor = real(path, flags, *rest, **options)  # type: ignore[arg-type]
        if made == 1 and ".out.tmp-" in str(path):
            Path(path).rmdir()
        return descriptor

    monkeypatch.setattr(Path, "mkdir", cleaned)
    monkeypatch.setattr(os, "open", replaced)
    with files.replace_directory(tmp_path / "out") as temporary:
        (temporary / "a").write_text("1")
    assert made == 2
    assert names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif os.geteuid() == 0:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # what /dev/null is
    else:
        pytest.skip("only root makes devices")
    with pytest.raises(BuildError, match=r"cannot write .*: a device, a pipe or a socket is there"):
        files.write_text_atomic(path, "x")
    assert not path.is_file()


def test_an_empty_path_is_refused() -> None:
    assert places.given_path("out", "--out") == Path("out")
    with pytest.raises(SokaError, match="--out is empty"):
        places.given_path("", "--out")


def test_errors_of_reading_are_not_those_of_writing(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"base/weights: cannot be read: Input/output error"),
        files.replace_directory(tmp_path / "out"),
        files.read_errors(Path("base/weights")),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(BuildError, match="out: Not a directory") as caught, files.replace_directory(tmp_path / "out"):
        pytest.fail("must not begin")
    assert "move it away" in str(caught.value.hint)
    with pytest.raises(BuildError, match="cannot write"), files.replace_directory(tmp_path / "out" / "below"):
        pytest.fail("must not begin")
    with pytest.raises(BuildError, match="cannot write"):
        files.write_text_atomic(tmp_path / "out" / "below", "x")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_directory_where_the_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BuildError, match="out: Is a directory"):
        files.write_text_atomic(tmp_path / "out", "x")
    assert names(tmp_path) == ["out"]


@pytest.mark.usefixtures("small_files")
def test_full_disk(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(BuildError, match=r"cannot write .*out: File too large") as caught:  # noqa: SIM117
        with files.replace_directory(target) as temporary:
            (temporary / "a").write_bytes(bytes(100_000))
    assert "ulimit" in str(caught.value.hint)
    with pytest.raises(BuildError, match="File too large"):
        files.write_bytes_atomic(target / "a", bytes(100_000))
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]
    assert names(target) == ["a"]


@pytest.mark.usefixtures("small_files")
def test_full_disk_in_the_safetensors_library(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    with pytest.raises(BuildError, match="File too large"), files.replace_directory(tmp_path / "out") as temporary:
        save_file({"w": torch.zeros(100_000)}, temporary / "model.safetensors")
    assert names(tmp_path) == []


def test_dev_full() -> None:
    with pytest.raises(BuildError, match="No space left") as caught, files.disk_errors(Path("x")):
        Path("/dev/full").write_text("x" * 100_000)
    assert "free some space" in str(caught.value.hint)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_errors_name_both_paths(number: int) -> None:
    with (
        pytest.raises(BuildError, match=r"cannot write out: .*\(at out/sub\)") as caught,
        files.disk_errors(Path("out")),
    ):
        raise OSError(number, os.strerror(number), "out/sub")
    assert caught.value.hint


def test_errors_without_a_target() -> None:
    known = files.explain_disk_error(OSError(errno.ENOSPC, "x", "some/file"))
    assert known is not None
    assert known.message == "some/file: No space left on device"
    assert files.explain_disk_error(FileNotFoundError(errno.ENOENT, "x", "some/file")) is None
    assert files.explain_disk_error(ValueError("(os error 28)")) is None


def test_other_errors_pass() -> None:
    with pytest.raises(FileNotFoundError), files.disk_errors(Path("x")):
        Path("/no/such/file").read_text()


def test_unwritable_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    root = os.geteuid() == 0  # root may write anywhere: be nobody for a moment
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(BuildError, match="Permission denied") as caught, files.replace_directory(tmp_path / "out"):
            pytest.fail("must not begin")
        with pytest.raises(BuildError, match="Permission denied"):
            files.write_text_atomic(tmp_path / "out", "x")
    finally:
        if root:
            os.seteuid(0)
        tmp_path.chmod(0o755)
    assert "writable" in str(caught.value.hint)
    assert names(tmp_path) == []


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abc")
    assert files.sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_windows_into_the_kernel_are_no_files() -> None:
    """/proc/kmsg looks like an empty file, and reading it waits without end."""
    for name in ("/proc/kmsg", "/proc/self/mounts"):
        with pytest.raises(OSError, match="not a file but a window into the kernel"):
            files.sha256_file(Path(name))


def test_a_folder_that_a_cleaner_takes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Path] = []
    plain = os.open

    def opened(path: Any, *more: Any, **options: Any) -> int:
        if not taken and leftovers.is_temporary(Path(path)):
            taken.append(Path(path))
            taken[0].rmdir()
        return plain(path, *more, **options)

    monkeypatch.setattr(os, "open", opened)
    with leftovers.locked_sibling(tmp_path / "build") as (path, _):
        assert path.is_dir()
        assert [path] != taken
