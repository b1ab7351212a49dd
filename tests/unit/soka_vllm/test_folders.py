"""An adapter's files are opened once, where they may lie; names and paths of clients lead nowhere else."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from soka_serve.adapter.format import CONFIG_FILE, WEIGHTS_FILE
from soka_vllm import folders
from soka_vllm.folders import OutsideError, lies_in, opened, renamed
from soka_vllm.places import Locks, allowed_roots, find_build, limited, roots_of
from soka_vllm.settings import ROOTS_VARIABLE


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(text)
    (folder / WEIGHTS_FILE).write_text(text)
    return folder


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A root, and a folder outside it; each with an adapter `good` that says where it lies."""
    roots, outside = tmp_path / "roots", tmp_path / "outside"
    write(roots / "good", "inside")
    write(outside / "good", "outside")
    return roots, outside


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr(folders, "_IN_MEMORY", folder)
    before = set(Path("/proc/self/fd").iterdir())
    yield
    assert not list(folder.iterdir())
    assert len(set(Path("/proc/self/fd").iterdir()) - before) <= 1  # the listing's own


def test_what_is_given(places: tuple[Path, Path]) -> None:
    roots, outside = places
    with opened(roots / "good", [roots]) as files:
        assert {p.name: p.read_text() for p in files.iterdir()} == {CONFIG_FILE: "inside", WEIGHTS_FILE: "inside"}
        assert stat.S_IMODE(files.parent.stat().st_mode) == 0o700
        # What happens to the folder afterwards changes nothing.
        (roots / "good" / CONFIG_FILE).unlink()
        (roots / "good" / CONFIG_FILE).symlink_to(outside / "good" / CONFIG_FILE)
        assert (files / CONFIG_FILE).read_text() == "inside"
        message = renamed(f"{files / CONFIG_FILE}: no", files, roots / "good")
    assert message == f"{roots / 'good' / CONFIG_FILE}: no"
    assert not files.exists()


def test_without_room_in_memory(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folders, "_IN_MEMORY", tmp_path / "nowhere")
    with opened(places[0] / "good") as files:
        assert files.is_relative_to(tempfile.gettempdir())
        assert (files / CONFIG_FILE).read_text() == "inside"


def test_memory_that_is_full_by_then(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    link = Path.symlink_to

    def full(self: Path, *arguments: Any, **options: Any) -> None:
        if self.is_relative_to(memory):
            raise OSError(errno.ENOSPC, "no space left", str(self))
        link(self, *arguments, **options)

    monkeypatch.setattr(folders, "_IN_MEMORY", memory)
    monkeypatch.setattr(Path, "symlink_to", full)
    with opened(places[0] / "good") as files:
        assert not files.is_relative_to(memory)
        assert (files / CONFIG_FILE).read_text() == "inside"
        assert not list(memory.iterdir())


def test_a_folder_that_is_not_there_is_empty_for_the_operator(places: tuple[Path, Path]) -> None:
    with opened(places[0] / "nowhere") as files:
        assert list(files.iterdir()) == []
    with pytest.raises(OutsideError), opened(places[0] / "nowhere", [places[0]]):
        pass


def test_the_operators_links_lead_anywhere(places: tuple[Path, Path]) -> None:
    roots, outside = places
    (roots / "hub").mkdir()
    (roots / "hub" / CONFIG_FILE).symlink_to(outside / "good" / CONFIG_FILE)  # as in the cache of a hub
    (roots / "hub" / "dangling.safetensors").symlink_to("nowhere")
    with opened(roots / "hub") as files:
        assert [p.name for p in files.iterdir()] == [CONFIG_FILE]
        assert (files / CONFIG_FILE).read_text() == "outside"


def test_kinds_of_files_are_told_and_nothing_waits(places: tuple[Path, Path]) -> None:
    """A pipe without a writer, a device: readers find what it is, and opening it was not needed for that."""
    folder = places[0] / "kinds"
    folder.mkdir()
    os.mkfifo(folder / "a.safetensors")
    (folder / "b.safetensors").symlink_to("/dev/zero")
    (folder / "c.safetensors").mkdir()
    with opened(folder) as files:
        assert stat.S_ISFIFO((files / "a.safetensors").stat().st_mode)
        assert stat.S_ISCHR((files / "b.safetensors").stat().st_mode)
        assert (files / "c.safetensors").is_dir()
    assert not lies_in(folder, [places[0]])  # /dev is outside


@pytest.mark.parametrize("link", ["folder", "file", "dangling", "loop", "parent"])
def test_links_that_lead_out(places: tuple[Path, Path], link: str) -> None:
    roots, outside = places
    folder = roots / "bad"
    if link == "folder":
        folder.symlink_to(outside / "good")
    elif link == "parent":
        (roots / "up").symlink_to(roots.parent)
        folder = roots / "up" / "outside" / "good"
    else:
        write(folder, "inside")
        (folder / WEIGHTS_FILE).unlink()
        targets = {"file": outside / "good" / WEIGHTS_FILE, "dangling": outside / "nowhere", "loop": WEIGHTS_FILE}
        (folder / WEIGHTS_FILE).symlink_to(targets[link])
    with pytest.raises(OutsideError, match="SOKA_ADAPTER_ROOTS"), opened(folder, [roots]):
        pass
    assert not lies_in(folder, [roots])


def test_a_hard_link_lies_where_its_name_lies(places: tuple[Path, Path]) -> None:
    roots, outside = places
    write(roots / "hard", "inside")
    (roots / "hard" / WEIGHTS_FILE).unlink()
    (roots / "hard" / WEIGHTS_FILE).hardlink_to(outside / "good" / WEIGHTS_FILE)
    assert lies_in(roots / "hard", [roots])
    (roots / "soft").mkdir()
    (outside / "second").hardlink_to(roots / "good" / WEIGHTS_FILE)
    (roots / "soft" / WEIGHTS_FILE).symlink_to(outside / "second")  # the same file, by its name outside
    assert not lies_in(roots / "soft", [roots])


def test_too_many_files(places: tuple[Path, Path]) -> None:
    for at in range(201):
        (places[0] / "good" / f"{at}.safetensors").touch()
    with pytest.raises(ValueError, match="203 files"), opened(places[0] / "good"):
        pass
    for at in range(10_000):
        (places[1] / "good" / f"{at}.txt").touch()  # nobody reads these
    with opened(places[1] / "good") as files:
        assert len(list(files.iterdir())) == 2


@pytest.mark.parametrize("what", ["a link to the folder", "the folder", "a link to a file", "a file"])
def test_what_changes_all_the_time(places: tuple[Path, Path], what: str) -> None:
    """Links swapped and things renamed 2,000 times and more while adapters are opened: what is read lies inside."""
    roots, outside = places
    moving = roots / "moving"
    if what == "a link to the folder":
        moving.symlink_to(roots / "good")
    else:
        write(moving, "inside")
    stop, swaps = threading.Event(), [0]

    def swap() -> None:
        spare = roots.parent / "spare"
        aside = roots.parent / "aside"
        while not stop.is_set():
            for target in (outside / "good", roots / "good"):
                if what == "the folder":  # moved out of the root and back again
                    source, destination = (moving, aside) if target.parent == outside else (aside, moving)
                    source.rename(destination)
                elif what == "a link to the folder":
                    spare.symlink_to(target)
                    spare.replace(moving)
                elif what == "a link to a file":
                    spare.symlink_to(target / WEIGHTS_FILE)
                    spare.replace(moving / WEIGHTS_FILE)
                else:
                    spare.write_text("inside")
                    spare.replace(moving / WEIGHTS_FILE)
                swaps[0] += 1
                time.sleep(0.0002)

    thread = threading.Thread(target=swap)
    thread.start()
    taken = 0
    deadline = time.monotonic() + 60
    try:
        while (swaps[0] < 2000 or taken < 50) and time.monotonic() < deadline:
            try:
                with opened(moving, [roots]) as files:
                    assert (files / WEIGHTS_FILE).read_text() == "inside"
                    assert (files / CONFIG_FILE).read_text() == "inside"
                    taken += 1
            except OutsideError:
                continue
    finally:
        stop.set()
        thread.join()
    assert swaps[0] >= 2000
    assert taken >= 50


class Request(msgspec.Struct):
    lora_name: str
    lora_path: str = "x"
    base_model_name: str | None = None


def test_requests_carry_the_folders() -> None:
    plain = Request("a", base_model_name="base")
    assert limited(plain, None) is plain
    assert roots_of(plain) is None
    assert roots_of(limited(plain, [])) == []  # nothing is allowed
    assert roots_of(limited(plain, [Path("/a b"), Path("c")])) == [Path("/a b"), Path("c").absolute()]
    assert plain.base_model_name == "base"


# --- names and paths that clients send --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """build/{math,flat,empty,linked,mixed,up}, and an adapter outside."""
    build = tmp_path / "build"
    for adapter in (tmp_path / "outside", *(build / name for name in ("math/adapter", "flat", ".hidden", "mixed"))):
        write(adapter, "{}")
    (build / "empty").mkdir()
    (build / "linked").symlink_to(tmp_path / "outside")
    (build / "up").symlink_to(tmp_path)
    (build / "alias").symlink_to(build / "math")
    (build / "loop").symlink_to(build / "loop")
    (build / "mixed" / "adapter_model.safetensors").unlink()
    (build / "mixed" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    return build


def test_builds_are_found_by_name(folder: Path) -> None:
    assert find_build(folder, "math") == folder / "math" / "adapter"
    assert find_build(folder, "flat") == folder / "flat"
    # A link that stays inside leads where it leads.
    assert find_build(folder, "alias") == folder / "alias" / "adapter"


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../outside", "math/..", "math/adapter", "/etc", "./flat", ".hidden", "flat/", "flat\n"),
        *("nowhere", "empty", "linked", "mixed", "up", "loop", "flat\x00", "..\\outside", "~", "a" * 5000, "ﬂat"),
    ],
)
def test_other_names_lead_nowhere(folder: Path, name: str) -> None:
    assert find_build(folder, name) is None


def test_absolute_names_lead_nowhere(folder: Path) -> None:
    assert find_build(folder, str(folder / "flat")) is None
    assert find_build(folder, str(folder.parent / "outside")) is None


def test_what_lies_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = folder.parent / "outside"
    assert lies_in(folder / "flat", [folder])
    assert lies_in(folder / "math" / ".." / "flat", [folder])
    assert lies_in(outside, [folder, outside])
    for name in ("../outside", "linked", "mixed", "loop", "/etc", "nowhere", "flat/adapter_config.json", "a\x00b"):
        assert not lies_in(folder / name, [folder])
    assert not lies_in(outside, [folder])
    assert not lies_in(folder / "flat", [])
    # A sibling whose name begins alike is another folder.
    assert not lies_in(folder / "flat", [folder.parent / "bui"])
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert lies_in(folder / "flat", [link])
    assert lies_in(link / "flat", [folder])
    monkeypatch.chdir(folder)
    assert lies_in(Path("flat"), [folder])


def test_the_allowed_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ROOTS_VARIABLE, raising=False)
    assert allowed_roots() is None
    monkeypatch.setenv(ROOTS_VARIABLE, "")
    assert allowed_roots() == []  # set to nothing: nothing is allowed
    monkeypatch.setenv(ROOTS_VARIABLE, os.pathsep.join(["/srv/a", "~/b"]))
    assert allowed_roots() == [Path("/srv/a"), Path.home() / "b"]


def test_locks_of_names_go_when_nobody_holds_them() -> None:
    """A client may ask for any number of names; one at a time for each."""
    locks = Locks()
    inside: list[int] = []

    async def enter(at: int) -> None:
        async with locks["one"]:
            inside.append(at)
            await asyncio.sleep(0)
            assert inside[-1] == at

    async def ask() -> None:
        await asyncio.gather(*(enter(at) for at in range(20)))
        for at in range(1000):
            async with locks[f"name{at}"]:
                assert locks[f"name{at}"].locked()

    asyncio.run(ask())
    assert len(inside) == 20
    assert len(locks) == 0
