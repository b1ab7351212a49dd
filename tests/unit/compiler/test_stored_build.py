"""A build that an earlier version of this program made, in tests/data/stored, is taken as up to date."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import soka_serve
from soka_serve.base.resolve import resolve_base
from soka_serve.builtin import base_directory
from soka_serve.compiler.status import stage_statuses
from soka_serve.manifest.read import read_manifest

REVISION = "0" * 40


@pytest.fixture
def stored(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the manifest and its build. The base is a hub model, the embedded one, so that its name has no path."""
    model = tmp_path / "hub" / "models--soka--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(REVISION)
    shutil.copytree(base_directory(), model / "snapshots" / REVISION)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return Path(shutil.copytree(root / "tests" / "data" / "stored", tmp_path / "stored"))


def _statuses(folder: Path) -> dict[str, str]:
    loaded = read_manifest(folder / "stored.toml")
    base = resolve_base(loaded.manifest.base, manifest_dir=folder)
    found = stage_statuses(loaded, base, folder / "out")
    assert isinstance(found, list), found
    return {status.name: status.reason for status in found}


def test_every_stage_is_up_to_date(stored: Path) -> None:
    stages = ("init", "tune", "export", "check", "report")
    assert _statuses(stored) == dict.fromkeys(stages, "unchanged since the last build")
    before = {file: file.read_bytes() for file in (stored / "out" / "stored").rglob("*") if file.is_file()}
    built = soka_serve.build(stored / "stored.toml", out=stored / "out", progress=False)
    assert built.ran == ()
    assert {file: file.read_bytes() for file in (stored / "out" / "stored").rglob("*") if file.is_file()} == before


def test_its_caches_are_taken(stored: Path) -> None:
    """Where the build itself is gone, what was trained is there."""
    shutil.rmtree(stored / "out" / "stored")
    found = _statuses(stored)
    assert {found["init"], found["tune"]} == {"from an interrupted or earlier build"}
    assert soka_serve.build(stored / "stored.toml", out=stored / "out", progress=False).ran == (
        "export",
        "check",
        "report",
    )
