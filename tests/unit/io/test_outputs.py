"""Which directories may be replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from soka_serve.comparison.compare import compare
from soka_serve.comparison.records import Records
from soka_serve.errors import BuildError, SokaError
from soka_serve.io import files
from soka_serve.io.lockfile import write_lock
from soka_serve.io.outputs import OutputKind, check_results
from soka_serve.io.places import check_place

THINGS = OutputKind("a thing", lambda lock: (lock or {}).get("kind") == "thing", lambda *_: ["a.json", "sub/*.txt"])


@pytest.fixture
def thing(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    write_lock(folder / "soka.lock", {"kind": "thing"})
    (folder / "a.json").touch()
    (folder / "sub" / "b.txt").touch()
    return folder


def test_its_own_files_and_nothing_else(tmp_path: Path, thing: Path) -> None:
    THINGS.check(thing)
    THINGS.check(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    THINGS.check(tmp_path / "empty")
    (tmp_path / "link").symlink_to(thing)
    THINGS.check(tmp_path / "link")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("b.json", "b.json"),
        ("b.txt", "b.txt"),  # of another folder
        ("sub/a.json", "sub/a.json"),
        ("sub/more/c.txt", "sub/more/"),
        ("other/sub/b.txt", "other/"),
        ("sub2/", "sub2/"),
        (".hidden", ".hidden"),
    ],
)
def test_anything_else_is_named(thing: Path, name: str, shown: str) -> None:
    (thing / name).parent.mkdir(parents=True, exist_ok=True)
    (thing / name).mkdir() if name.endswith("/") else (thing / name).touch()
    assert THINGS.foreign(thing) == [shown]
    with pytest.raises(BuildError, match=f"not part of a thing: {shown}$"):
        THINGS.check(thing)


def test_links_and_pipes_of_the_right_name_are_not_its_own(tmp_path: Path, thing: Path) -> None:
    (thing / "a.json").unlink()
    (thing / "a.json").symlink_to(tmp_path / "elsewhere")
    (thing / "sub" / "b.txt").unlink()
    (thing / "sub").rmdir()
    (tmp_path / "folder").mkdir()
    (thing / "sub").symlink_to(tmp_path / "folder")
    assert THINGS.foreign(thing) == ["a.json", "sub"]


@pytest.mark.parametrize("text", [None, "", "kind = 'other'", "= damaged"])
def test_no_mark(thing: Path, text: str | None) -> None:
    (thing / "soka.lock").unlink() if text is None else (thing / "soka.lock").write_text(text)
    with pytest.raises(BuildError, match=r"no soka\.lock in it says that it is a thing.*it holds a\.json"):
        THINGS.check(thing)


def test_many_are_counted(tmp_path: Path) -> None:
    for i in range(25):
        (tmp_path / f"{i:02}.txt").touch()
    with pytest.raises(BuildError, match=r"00\.txt, .*09\.txt, and 15 more$"):
        THINGS.check(tmp_path)


def test_inputs(tmp_path: Path) -> None:
    source = tmp_path / "in" / "base"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    for target in (tmp_path / "in", source, tmp_path / "in" / "x" / "..", tmp_path / "link"):
        with pytest.raises(BuildError, match=r"writing a thing there would destroy .*base"):
            THINGS.check(target, keep=[source])


@pytest.mark.parametrize("place", [".", "..", "~", "/", "/proc/x", "/sys", "/dev/x", "/dev/null/x"])
def test_no_place_for_outputs(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    target = Path(place).expanduser()
    with pytest.raises(BuildError, match="cannot write"):
        THINGS.check(target)
    with pytest.raises(BuildError, match="cannot write"), files.replace_directory(target):
        pytest.fail("must not begin")
    assert (tmp_path / "here").is_dir()
    assert (tmp_path / "home").is_dir()


def test_a_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path)
    with pytest.raises(BuildError, match="mount point") as caught:
        THINGS.check(tmp_path)
    assert str(tmp_path / "out") in str(caught.value.hint)
    THINGS.check(tmp_path / "out")


def test_memory_is_a_place_and_devices_are_not() -> None:
    for path in ("/dev/null", "/dev/merged", "/proc/self/fd/0/x"):
        with pytest.raises(BuildError, match=r"lies in /(dev|proc)"):
            check_place(Path(path))
    check_place(Path("/dev/shm/soka/out"), replaced=True)


def test_the_old_directory_is_looked_at_again(tmp_path: Path, thing: Path) -> None:
    with files.replace_directory(thing, foreign=THINGS.foreign) as new:
        (new / "a.json").write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    write_lock(thing / "soka.lock", {"kind": "thing"})
    with files.replace_directory(thing, foreign=THINGS.foreign) as new:
        (thing / "mine.txt").write_text("mine")
        (new / "a.json").write_text("newer")
    (kept,) = (p for p in tmp_path.iterdir() if p != thing)
    assert kept.name.startswith("out.earlier-")
    assert (kept / "mine.txt").read_text() == "mine"
    assert (thing / "a.json").read_text() == "newer"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_what_comes_in_the_last_moment_is_kept(
    tmp_path: Path, thing: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap = files._swap

    def late(temporary: Path, target: Path) -> Path | None:
        if moment == "before":
            (target / "mine.txt").write_text("mine")
        old = swap(temporary, target)
        if moment == "after":
            assert old is not None
            (old / "mine.txt").write_text("mine")
        return old

    monkeypatch.setattr(files, "_swap", late)
    with files.replace_directory(thing, foreign=THINGS.foreign) as new:
        (new / "a.json").write_text("new")
    (kept,) = (p for p in tmp_path.iterdir() if p != thing)
    assert (kept / "mine.txt").read_text() == "mine"
    assert (thing / "a.json").read_text() == "new"


def test_names_are_printed_as_they_can_be(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[31m\nb").touch()
    with pytest.raises(BuildError, match=r"it holds a\\x1b\[31m\\nb$"):
        THINGS.check(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"a": 1}', '{"a": 1, "b": 2}'])
def test_results_replace_results_only(tmp_path: Path, text: str | None) -> None:
    file, table = tmp_path / "r.json", tmp_path / "r.md"
    check_results(file, [table], ("a", "b"))
    table.write_text("mine")
    if text is not None:
        file.write_text(text)
    if text == '{"a": 1, "b": 2}':
        check_results(file, [table], ("a", "b"))
        return
    with pytest.raises(BuildError, match=r"would overwrite .*r\.md, which no earlier call wrote"):
        check_results(file, [table], ("a", "b"))


@pytest.mark.parametrize("name", ["README.json", "results.json", "page.html", "notes.md"])
def test_a_comparison_overwrites_nothing_of_the_users(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soka_serve.comparison.compare.read_inputs", lambda *_: pytest.fail("work was begun"))
    for mine in ("README.md", "results.html", "page.html", "notes.md"):
        (tmp_path / mine).write_text("mine")
    with pytest.raises(BuildError, match=r"would overwrite|is the name of the JSON file"):
        compare("eval/suites/quick.toml", work=tmp_path / "work", out=tmp_path / name, progress=False)
    assert (tmp_path / "README.md").read_text() == (tmp_path / "results.html").read_text() == "mine"
    with pytest.raises(SokaError, match="work is empty"):
        compare("eval/suites/quick.toml", work="", progress=False)


def test_only_records_are_read_and_damaged_ones_removed(tmp_path: Path) -> None:
    for name, text in {"mine": "{", "0" * 24: "{", "1" * 24: '{"status": "done"}', "2" * 24: "[]"}.items():
        (tmp_path / f"{name}.json").write_text(text)
    assert Records(tmp_path).read() == {"1" * 24: {"status": "done"}}
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["1" * 24, "mine"]
