"""Caches of hashes spoilt at random: they cost time and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hypothesis import strategies as st

from soka_serve.io.files import sha256_file
from soka_serve.io.workspace import HashCache
from tests.fuzzing.limits import bounded, is_plain
from tests.fuzzing.spoil import JSON, JSON_TEXTS, NODES

_ENTRY_PARTS = JSON | st.sampled_from(["0" * 64, "F" * 64, "", -1, 0, True, 2**70])


def spoil_cache(draw: st.DrawFn, folder: Path) -> None:
    """A file `weights`, and something at `hashes.json`; no entry has the file's own size, time and number."""
    weights, cache = folder / "weights", folder / "hashes.json"
    weights.write_bytes(draw(st.binary(max_size=8)))
    kind = draw(st.sampled_from(["json", "entries", "text", "bytes", "hole", "cut", *sorted(NODES)]))
    if kind == "json":
        cache.write_text(json.dumps(draw(JSON)))
    elif kind == "entries":
        names = st.just(str(weights)) | st.text(max_size=8)
        cache.write_text(
            json.dumps(draw(st.dictionaries(names, st.lists(_ENTRY_PARTS, max_size=5) | JSON, max_size=4)))
        )
    elif kind == "text":
        cache.write_text(draw(JSON_TEXTS))
    elif kind == "bytes":
        cache.write_bytes(draw(st.binary(max_size=60)))
    elif kind == "hole":
        cache.touch()
        os.truncate(cache, draw(st.sampled_from([1 << 20, 17 << 20, 4 << 40])))
    elif kind == "cut":
        written = HashCache(cache)
        written.file(weights)
        written.save()
        text = cache.read_text()
        cache.write_text(text[: draw(st.integers(0, len(text) - 1))])
    else:
        NODES[kind](cache)


def check_cache(folder: Path) -> bool:
    """Right hashes, now and from what is saved; returns whether they could be remembered."""
    weights, path = folder / "weights", folder / "hashes.json"
    with bounded():
        cache = HashCache(path)
        assert not cache.knows(weights)
        assert cache.file(weights) == sha256_file(weights)
        cache.save()
        again = HashCache(path)
        assert again.file(weights) == sha256_file(weights)
        assert again.knows(weights) or path.is_symlink() or not path.is_file()
        cache.check_unchanged()
    mine = folder / "hashes.json.mine"  # which a link led to
    assert not mine.exists() or mine.read_text() == "mine"
    return is_plain(path)
