"""Names and paths that clients send lead to adapters inside the allowed folders, and nowhere else."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from soka_vllm.opened import lies_in
from soka_vllm.places import Locks, allowed_roots, find_build
from soka_vllm.settings import ROOTS_VARIABLE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """build/{math,flat,empty,linked,mixed,up}, and an adapter outside."""

    def adapter(directory: Path) -> None:
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text("{}")
        (directory / "adapter_model.safetensors").write_text("")

    build = tmp_path / "build"
    adapter(tmp_path / "outside")
    adapter(build / "math" / "adapter")
    adapter(build / "flat")
    adapter(build / ".hidden")
    (build / "empty").mkdir()
    (build / "linked").symlink_to(tmp_path / "outside")
    (build / "up").symlink_to(tmp_path)
    (build / "alias").symlink_to(build / "math")
    (build / "loop").symlink_to(build / "loop")
    adapter(build / "mixed")
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
    for path in (
        outside,
        folder / ".." / "outside",
        folder / "linked",
        folder / "mixed",
        folder / "loop",
        Path("/etc"),
    ):
        assert not lies_in(path, [folder])
    for path in (folder / "nowhere", folder / "flat" / "adapter_config.json", folder / "a\x00b"):
        assert not lies_in(path, [folder])
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
