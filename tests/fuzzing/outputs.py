"""Folders that hold a user's files as `--out` of `merge`, `export` and `extract`: none of them ever disappears."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from hypothesis import strategies as st

from soka_serve.builtin import base_directory
from soka_serve.io.toml_text import parse_toml
from tests.fuzzing.adapters import write_good_adapter
from tests.fuzzing.limits import is_plain, run, snapshot
from tests.fuzzing.spoil import NODES

_STARTS = ("nothing", "empty", "base", "base and a merged lock", "merged", "export", "adapter", "models")
_OWN = (
    *("model.safetensors", "config.json", "soka.lock", "README.md"),
    *("model.safetensors.index.json", "adapter_config.json"),
)
_NOTES = (
    *("notes.md", ".hidden", "sub/notes.md", "model.safetensors.bak", "adapter/x", "Config.json"),
    *("\x1b[31m\n", "x.bin"),
)
_NAMED = ("../x", "notes.md", "sub/notes.md", "/nonexistent/x", "model.safetensors", "soka.lock", "*", "")
_LOCKS = (
    *("", "=", "kind = 'merged'", "kind = ['merged']", "[kind]", "[export]\nto = 'soka'", "export = 1"),
    "a" + ".a" * 30_000,
)


def write_outputs(folder: Path) -> None:
    """An adapter and what the commands make of it: `adapter`, `merged` and `export`."""
    write_good_adapter(folder / "adapter")
    for command, out, *options in (("merge", "merged", "--base", "tiny", "--no-verify"), ("export", "export")):
        assert run(command, str(folder / "adapter"), "--out", str(folder / out), *options).exit_code == 0


def fill(draw: st.DrawFn, good: Path, place: Path) -> None:
    """A folder `out` in `place`, and files beside it.

    Args:
        draw: what is in it.
        good: see `write_outputs`.
        place: an empty directory.
    """
    out = place / "out"
    (place / "x").write_text("mine")
    start = draw(st.sampled_from(_STARTS))
    if start in ("merged", "export", "adapter"):
        shutil.copytree(good / start, out)
    elif start.startswith("base"):
        shutil.copytree(base_directory(), out)
        if start != "base":
            shutil.copy(good / "merged" / "soka.lock", out)
    elif start == "models":
        shutil.copytree(good / "merged", out / "mine")
    elif start == "empty":
        out.mkdir()
    for _ in range(draw(st.integers(0, 3)) if out.is_dir() else 0):
        _put(draw, out, good)


def _own(good: Path, place: Path, command: str) -> set[str]:
    """The paths that an earlier output of a command may have in `place`: where a lock says that it is one, regular
    files with the names that such an output has."""
    lock = place / "out" / "soka.lock"
    if not is_plain(lock):
        return set()
    try:
        found = parse_toml(lock.read_text())
    except ValueError:
        return set()
    if found.get("kind") != "merged" if command == "merge" else not isinstance(found.get("export"), dict):
        return set()
    names = {path.name for path in (good / ("merged" if command == "merge" else "export")).iterdir()}
    names |= {".DS_Store", "model.safetensors.index.json"} if command == "merge" else {".DS_Store"}
    return {f"out/{name}" for name in names if is_plain(place / "out" / name)}


def _put(draw: st.DrawFn, out: Path, good: Path) -> None:
    """Put something of the user's into a folder."""
    kind = draw(st.sampled_from(["notes", "index", "lock", "node", "desktop"]))
    if kind == "desktop":
        (out / ".DS_Store").touch()  # a file manager's, which nobody misses
    elif kind == "index":
        names = {f"t{i}": name for i, name in enumerate(draw(st.lists(st.sampled_from(_NAMED), max_size=3)))}
        _write(out / "model.safetensors.index.json", json.dumps({"weight_map": names}))
    elif kind == "lock":
        _write(out / "soka.lock", draw(st.sampled_from([*_LOCKS, (good / "merged" / "soka.lock").read_text()])))
    elif kind == "notes":
        _write(out / draw(st.sampled_from(_NOTES)), "mine")
    else:
        file = out / draw(st.sampled_from(_OWN))
        if is_plain(file):
            file.unlink()
        if not os.path.lexists(file):
            NODES[draw(st.sampled_from(sorted(NODES)))](file)


def _write(file: Path, text: str) -> None:
    if is_plain(file) or not os.path.lexists(file):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)


def check_output(draw: st.DrawFn, good: Path, place: Path) -> bool:
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
    before, own = snapshot(place), _own(good, place, command)
    done = run(command, str(adapter), "--out", str(out), *options)
    after = snapshot(place)
    lost = {path for path, entry in before.items() if path not in own | {"out/.DS_Store"} and after.get(path) != entry}
    assert not lost, (command, out.name, sorted(lost), done.output)
    if done.exit_code:
        assert after == before, (sorted(after.keys() ^ before.keys()), done.output)
    return done.exit_code == 0
