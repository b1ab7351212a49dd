"""What several evaluations share: which of them a server, and for how long the base in memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from soka_serve.base import model
from soka_serve.builtin import base_directory
from soka_serve.evaluation import shared
from soka_serve.evaluation.backends import TransformersBackend
from soka_serve.evaluation.many import _groups, _sharing
from soka_serve.evaluation.run import EvalSettings
from soka_serve.evaluation.shared import SharedServer
from soka_serve.evaluation.subject import Evaluation, Subject
from soka_serve.manifest.read import read_manifest
from soka_serve.serving.targets import Kind, Target

MANIFEST = 'schema = 1\n[base]\nbuiltin = "tiny"\n[train]\nsteps = 1\n[train.data]\njsonl = "d.jsonl"\n'


def make(folder: Path, name: str, *, kind: Kind = "adapter", quantize: str | None = None) -> Evaluation:
    file = folder / f"{name}.toml"
    file.write_text(MANIFEST)
    loaded, base = read_manifest(file), base_directory()
    target = Target(str(file), name, kind, folder / name, quantize=quantize)
    subject = Subject(loaded.manifest, target, base, base, 64)
    return Evaluation(loaded, subject, TransformersBackend(subject, batch_size=1), (), 1, folder, False)


def test_an_adapter_that_servers_refuse_does_not_keep_others_from_sharing_one(tmp_path: Path) -> None:
    made = {Path(name): make(tmp_path, name, quantize=bits) for name, bits in (("a", None), ("b", "4bit"), ("c", None))}
    groups = [[str(path) for path in group] for group in _groups(made, EvalSettings())]
    assert groups == [["a", "c"], ["b"]]
    assert len(_groups(made, EvalSettings(backend="transformers"))) == 1


def test_one_base_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EvalSettings(backend="transformers")
    shutil.copytree(base_directory(), tmp_path / "merged")
    evaluation = make(tmp_path, "merged", kind="merged")
    backend, alive = evaluation.backend, list[Any]()
    assert isinstance(backend, TransformersBackend)
    with _sharing([evaluation], settings), backend.roles() as open_role:
        common = backend.shared
        assert common is not None
        with open_role("base"):
            assert common._base is not None
        load = model.load_base
        monkeypatch.setattr(model, "load_base", lambda *key: (alive.append(common._base), load(*key))[1])
        with open_role("result"):
            assert alive == [None]
    adapter = make(tmp_path, "adapter")
    assert isinstance(adapter.backend, TransformersBackend)
    with _sharing([adapter], settings), adapter.backend.roles() as open_role, open_role("base"):
        pass
    assert adapter.backend.shared is not None
    assert adapter.backend.shared._base is None


def test_a_shared_server_that_has_died_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers, ended = [], []

    @contextmanager
    def started(*_: object) -> Iterator[Any]:
        servers.append(SimpleNamespace(lives=lambda: True))
        yield None, servers[-1]
        ended.append(servers.index(servers[-1]))

    monkeypatch.setattr(shared, "started_vllm", started)
    with SharedServer([make(tmp_path, name).subject for name in "ab"], ()) as server:
        first = server.running()
        assert first is not None
        assert server.running() == first
        servers[0].lives = lambda: False
        second = server.running()
        assert second is not None
        assert second[1] is servers[1]
        assert ended == [0]
    assert ended == [0, 1]
