"""What a build looks at before it starts, and what `plan` says of its stages."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from io import BufferedIOBase
from pathlib import Path

import pytest

from soka_serve.base.base import Base
from soka_serve.builtin import base_directory
from soka_serve.compiler.context import Context, check_output, is_whole, prepare, previous_keys
from soka_serve.compiler.plan.plan import StageStatus
from soka_serve.compiler.plan.text import render_plan
from soka_serve.compiler.status import plan, stage_statuses
from soka_serve.data import sources
from soka_serve.data.rows import open_data
from soka_serve.errors import BuildError
from soka_serve.io.lockfile import write_lock
from soka_serve.io.workspace import Workspace
from soka_serve.manifest.read import read_manifest

MANIFEST = """\
schema = 1
name = "small"
{comment}
[base]
path = "{base}"
[train]
steps = 1
[train.data]
{data}
"""


def _context(directory: Path, *, base: str = "base", data: str = 'builtin = "math"', comment: str = "") -> Context:
    if not (directory / base).exists():
        shutil.copytree(base_directory(), directory / base)
    path = directory / "small.toml"
    path.write_text(MANIFEST.format(base=base, data=data, comment=comment))
    return prepare(read_manifest(path), Workspace(directory / "build", "small"), progress=False)


def _artefact(directory: Path) -> Path:
    """A finished build, as far as the lock tells."""
    target = directory / "build" / "small"
    target.mkdir(parents=True)
    (target / "report.html").write_text("report")
    lock = {"stages": {"init": "1"}, "files": {"report.html": 6}, "manifest": {"file": "first.toml"}}
    write_lock(target / "soka.lock", lock)
    return target


def test_every_file_of_the_base_that_changes_the_result_changes_a_key(tmp_path: Path) -> None:
    before = _context(tmp_path).keys
    for name, old, new in (
        ("config.json", '"rope_theta": 10000.0', '"rope_theta": 20000.0'),
        ("tokenizer_config.json", '"model_max_length"', '"chat_template": "x", "model_max_length"'),
    ):
        text = (tmp_path / "base" / name).read_text()
        assert old in text
        (tmp_path / "base" / name).write_text(text.replace(old, new))
        after = _context(tmp_path).keys
        assert after["tune"] != before["tune"], name
        before = after
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    assert _context(tmp_path).keys["tune"] != before["tune"]


def test_a_comment_changes_the_report_and_no_other_stage(tmp_path: Path) -> None:
    plain, commented = _context(tmp_path).keys, _context(tmp_path, comment="# why").keys
    assert [stage for stage in plain if plain[stage] != commented[stage]] == ["report"]


def test_a_build_may_be_replaced(tmp_path: Path) -> None:
    context = _context(tmp_path)
    check_output(context)
    context.workspace.directory.mkdir(parents=True)
    check_output(context)  # an empty folder
    context.workspace.directory.rmdir()
    (_artefact(tmp_path) / ".DS_Store").write_text("a file manager was here")
    check_output(context)


def test_replacing_another_manifests_build_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _artefact(tmp_path)
    check_output(_context(tmp_path))
    assert "was built from first.toml; this build of small.toml replaces it" in caplog.text


@pytest.mark.parametrize("files", [["adapter_config.json"], []])
def test_folders_put_into_a_build_are_not_lost(tmp_path: Path, files: list[str]) -> None:
    folder = _artefact(tmp_path) / "mine"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    with pytest.raises(BuildError, match="not part of a build: mine/"):
        check_output(_context(tmp_path))


@pytest.mark.parametrize("what", ["base", "data"])
def test_a_build_does_not_replace_what_it_reads(tmp_path: Path, what: str) -> None:
    inside = tmp_path / "build" / "small"
    if what == "base":
        context = _context(tmp_path, base="build/small/merged")
    else:
        inside.mkdir(parents=True)
        (inside / "train.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
        context = _context(tmp_path, data='jsonl = "build/small/train.jsonl"')
    with pytest.raises(BuildError, match=r"would destroy .*, which is read for it"):
        check_output(context)


def test_a_damaged_lock_is_built_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = _artefact(tmp_path)
    assert is_whole(target)
    assert previous_keys(target) == {"init": "1"}
    (target / "soka.lock").write_text("= not TOML")
    assert not is_whole(target)
    assert previous_keys(target) == {}
    check_output(_context(tmp_path))
    assert "everything runs again" in caplog.text
    for name in ("notes.md", "adapter/notes.md", "checkpoints/README.md"):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text("mine")
        with pytest.raises(BuildError, match=f"not part of a build: {name if 'checkpoints' not in name else 'check'}"):
            check_output(_context(tmp_path))
        (target / name).unlink()


@pytest.mark.parametrize("lock", [{"kind": "merged"}, {"export": {}, "stages": {}}, {"stages": {}, "files": 1}])
def test_a_lock_of_something_else_is_no_mark_of_a_build(tmp_path: Path, lock: dict[str, object]) -> None:
    target = tmp_path / "build" / "small"
    target.mkdir(parents=True)
    write_lock(target / "soka.lock", lock)
    with pytest.raises(BuildError, match=r"no soka\.lock in it says that it is a build"):
        check_output(_context(tmp_path))


@pytest.mark.parametrize(
    "text", ["files = 5\nstages = 1\n", "stages = 1\n[files]\n", "manifest = 1\n[files]\n[stages]\n"]
)
def test_a_lock_of_another_form_is_no_build_of_ours(tmp_path: Path, text: str) -> None:
    target = _artefact(tmp_path)
    (target / "soka.lock").write_text(text)
    assert not is_whole(target)
    assert previous_keys(target) == {}
    with pytest.raises(BuildError, match=r"report.html"):
        check_output(_context(tmp_path))


# --- what `plan` says of the stages -----------------------------------------------------------------------------------


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

    target = context.workspace.directory
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


def test_data_is_read_once_to_be_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are keys for it with and without its evaluation set."""
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "m.toml").write_text(
        'schema = 1\nbase = { builtin = "tiny" }\n[train]\nsteps = 1\n'
        'data = { jsonl = "train.jsonl", eval_jsonl = "eval.jsonl" }\n'
    )
    opened: list[str] = []

    def spy(file: Path) -> AbstractContextManager[BufferedIOBase]:
        opened.append(file.name)
        return open_data(file)

    monkeypatch.setattr(sources, "open_data", spy)
    inputs = prepare(read_manifest(tmp_path / "m.toml"), Workspace(tmp_path, "m"), progress=False).inputs
    assert sorted(opened) == ["eval.jsonl", "train.jsonl"]
    train = read_manifest(tmp_path / "m.toml").manifest.train
    assert inputs.data == sources.mixture_sha256(train, manifest_dir=tmp_path)
    assert inputs.training == sources.mixture_sha256(train, manifest_dir=tmp_path, evaluation=False) != inputs.data
