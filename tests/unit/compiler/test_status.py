"""What `plan` says of a build's stages: cached, to run, or why that cannot be told."""

from __future__ import annotations

from pathlib import Path

from soka_serve.base.opened import Base
from soka_serve.builtin import base_directory
from soka_serve.compiler.context import prepare
from soka_serve.compiler.plan.plan import StageStatus
from soka_serve.compiler.plan.text import render_plan
from soka_serve.compiler.status import plan, stage_statuses
from soka_serve.io.lockfile import write_lock
from soka_serve.io.workspace import Workspace
from soka_serve.manifest.read import read_manifest


def _manifest(directory: Path, rule: str = "", data: str = 'builtin = "math"\nlimit = 8') -> Path:
    path = directory / "small.toml"
    text = f'schema = 1\n[base]\nbuiltin = "tiny"\n[[adapt]]\n{rule}\n[train]\nsteps = 1\n[train.data]\n{data}\n'
    path.write_text(text)
    return path


def _statuses(directory: Path) -> dict[str, StageStatus]:
    found = stage_statuses(read_manifest(directory / "small.toml"), Base(base_directory()), directory / "build")
    assert not isinstance(found, str)
    return {status.name: status for status in found}


def test_from_nothing_to_a_finished_build(tmp_path: Path) -> None:
    context = prepare(read_manifest(_manifest(tmp_path)), Workspace(tmp_path / "build", "small"), progress=False)
    assert {s.reason for s in _statuses(tmp_path).values()} == {"not built yet"}

    tune = context.workspace.stage("tune", context.keys["tune"])
    tune.mkdir(parents=True)
    assert "resume point" in _statuses(tmp_path)["tune"].reason
    (tune / "done.json").write_text("{}")
    assert [s.name for s in _statuses(tmp_path).values() if s.cached] == ["tune"]

    target = context.workspace.target
    target.mkdir(parents=True)
    (target / "report.html").write_text("report")
    write_lock(target / "soka.lock", {"stages": context.keys, "files": {"report.html": 6}})
    assert all(s.cached for s in _statuses(tmp_path).values())

    # A build looks at the files too, and so must its plan.
    (target / "report.html").unlink()
    assert [s.name for s in _statuses(tmp_path).values() if s.cached] == ["tune"]

    (target / "report.html").write_text("report")
    _manifest(tmp_path, 'modules = ["q_proj"]')
    assert not any(s.cached for s in _statuses(tmp_path).values())


def test_what_stops_a_build_is_said(tmp_path: Path) -> None:
    made = plan(_manifest(tmp_path, 'init = "delta"\nfinetuned = "../nowhere"'), out=tmp_path / "build")
    assert made.stages is None
    assert "nowhere: no such directory" in str(made.stages_problem)
    assert "adapt[0].finetuned: " in str(made.stages_problem)
    assert f"not known: {made.stages_problem}" in render_plan(made, color=False)
    assert made.to_json()["stages_problem"] == made.stages_problem


def test_missing_data_is_said_once(tmp_path: Path) -> None:
    made = plan(_manifest(tmp_path, "", 'jsonl = "nowhere.jsonl"'), out=tmp_path / "build")
    cause = f"{tmp_path / 'nowhere.jsonl'}: not found"
    assert made.data.problem == f"examples cannot be shown: {cause}"
    assert made.stages_problem == f"a build would stop: {cause}"
    text = render_plan(made, color=False)
    assert text.count(cause) == 1
    assert "not known: a build would stop, see Data" in text


def test_planning_writes_nothing(tmp_path: Path) -> None:
    plan(_manifest(tmp_path), out=tmp_path / "build")
    assert not (tmp_path / "build").exists()
