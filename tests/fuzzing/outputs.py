"""Folders that hold a user's files as `--out` of `merge`, `export` and `extract`: none of them ever disappears."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from hypothesis import strategies as st

from soka_serve.builtin import base_directory
from tests.fuzzing.adapters import write_good_adapter
from tests.fuzzing.limits import run, snapshot
from tests.fuzzing.spoil import NODES

_STARTS = ("nothing", "empty", "base", "base and a merged lock", "merged", "export", "adapter", "models")
_OWN = ("model.safetensors", "config.json", "soka.lock", "README.md", "model.safetensors.index.json", "adapter_config.json")
_NOTES = ("notes.md", ".hidden", "sub/notes.md", "model.safetensors.bak", "adapter/x", "Config.json", "\x1b[31m\n", "x.bin")
_NAMED = ("../x", "notes.md", "sub/notes.md", "/nonexistent/x", "model.safetensors", "soka.lock", "*", "")
_LOCKS = ("", "=", "kind = 'merged'", "kind = ['merged']", "[kind]", "[export]\nto = 'soka'", "export = 1", "a" + ".a" * 30_000)


def write_outputs(folder: Path) -> None:
    """An adapter and what the commands make of it: `adapter`, `merged` and `export`."""
    write_good_adapter(folder / "adapter")
    assert run("merge", str(folder / "adapter"), "--base", "tiny", "--out", str(folder / "merged"), "--no-verify").exit_code == 0
    assert run("export", str(folder / "adapter"), "--out", str(folder / "export")).exit_code == 0


def fill(draw: st.DrawFn, good: Path, place: Path) -> set[str]:
    """A folder `out` in `place`, and files beside it.

    Args:
        draw: what is in it.
        good: see `write_outputs`.
        place: an empty directory.

    Returns:
        The paths in `place` that are an earlier output's own, which may be replaced.
    """
    out, own = place / "out", set[str]()
    (place / "x").write_text("mine")
    start = draw(st.sampled_from(_STARTS))
    if start in ("merged", "export"):
        shutil.copytree(good / start, out)
        own = set(snapshot(place)) - {"x"}
    elif start.startswith("base"):
        shutil.copytree(base_directory(), out)
        if start != "base":  # so it is a merged model to whoever reads the lock; only what else there is, is the user's
            shutil.copy(good / "merged" / "soka.lock", out)
            own = set(snapshot(place)) - {"x", "out/training.json"}
    elif start == "adapter":
        shutil.copytree(good / "adapter", out)
    elif start == "models":
        shutil.copytree(good / "merged", out / "mine")
    elif start == "empty":
        out.mkdir()
    for _ in range(draw(st.integers(0, 3)) if out.is_dir() else 0):
        own -= _put(draw, out, good)
    return own | {"out/.DS_Store"}


def _put(draw: st.DrawFn, out: Path, good: Path) -> set[str]:
    """Put something of the user's into a folder; returns the paths that are now theirs."""
    kind = draw(st.sampled_from(["notes", "index", "lock", "node", "desktop"]))
    if kind == "index":
        names = {f"t{i}": name for i, name in enumerate(draw(st.lists(st.sampled_from(_NAMED), max_size=3)))}
        if not os.path.lexists(out / "model.safetensors.index.json"):
            (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        return set()
    if kind == "desktop":
        (out / ".DS_Store").touch()  # a file manager's, which nobody misses
        return set()
    name = "soka.lock" if kind == "lock" else draw(st.sampled_from(_NOTES if kind == "notes" else _OWN))
    file = out / name
    if kind == "lock" and draw(st.booleans()):
        text = draw(st.sampled_from([*_LOCKS, (good / "merged" / "soka.lock").read_text()]))
        if not os.path.lexists(file):
            file.write_text(text)
        return set()
    if os.path.lexists(file):
        if kind == "notes" or not file.is_file() or file.is_symlink():
            return set()
        file.unlink()
    file.parent.mkdir(exist_ok=True)
    if kind == "notes":
        file.write_text("mine")
    else:
        NODES[draw(st.sampled_from(sorted(NODES)))](file)
    return {f"out/{part}" for part in (name, name.partition("/")[0])}


def check_output(draw: st.DrawFn, good: Path, place: Path, own: set[str]) -> bool:
    """A command writes to `out` or refuses to; whatever is not an earlier output's own is there afterwards, unchanged.

    Returns:
        Whether it was written.
    """
    command = draw(st.sampled_from(["merge", "export"]))
    out = draw(st.sampled_from([place / "out", place / "out" / ".." / "out", place / "link", place / "out" / "new"]))
    if out.name == "link":
        out.symlink_to("out")
    adapter = good / "adapter" if draw(st.integers(0, 3)) else place / "out"
    options = ["--base", "tiny", "--no-verify"] if command == "merge" else []
    before = snapshot(place)
    done = run(command, str(adapter), "--out", str(out), *options)
    after = snapshot(place)
    lost = {path for path, entry in before.items() if path not in own and after.get(path) != entry}
    assert not lost, (command, out.name, sorted(lost), done.output)
    if done.exit_code:
        assert after == before, (sorted(after.keys() ^ before.keys()), done.output)
    return done.exit_code == 0
