"""Which folders a merge replaces, and which it refuses to."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from soka_serve.base.checkpoint import Checkpoint
from soka_serve.compiler.merge import merge as merging
from soka_serve.errors import BuildError
from soka_serve.io.lockfile import write_lock
from tests.support.merging import run
from tests.support.tiny_models import write_base


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
