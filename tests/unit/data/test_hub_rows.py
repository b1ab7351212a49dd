"""Datasets of a hub's layout: what may be named, and that no more is read than is asked for."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from soka_serve.data.examples import DataReader
from soka_serve.data.hub_rows import hub_rows
from soka_serve.data.sources import data_sha256
from soka_serve.errors import DataError
from soka_serve.manifest.schema import Data
from tests.unit.data.test_examples import load, write_rows

MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


class _Mark:
    """What a pickle runs when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.mark),)


def test_names_of_readers_are_refused(tmp_path: Path) -> None:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    for name in {*_PACKAGED_DATASETS_MODULES, "json", "JSON", "pandas", "sql", "generator", "webdataset"}:
        with pytest.raises(DataError, match=f"train.data.hub: '{name}' is a reader of the datasets library"):
            load(tmp_path, hub=name)


def test_pickles_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hub = "pandas"` takes the pickles of the working directory, in datasets 4."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(_Mark(tmp_path / "mark")))
    with pytest.raises(DataError, match="reader"):
        load(tmp_path, hub="pandas")
    assert not (tmp_path / "mark").exists()
    folder = tmp_path / "sets"
    folder.mkdir()
    (folder / "train.pkl").write_bytes(pickle.dumps(_Mark(tmp_path / "mark")))
    with pytest.raises(DataError):
        load(tmp_path, hub="sets")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["sets", "./sets", "sets/sets.py", "other.py"])
def test_scripts_are_not_run(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    (folder / "sets.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).mkdir()\n")
    write_rows(folder / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match="script"):
        load(tmp_path, hub=name)
    assert not (tmp_path / "mark").exists()


def test_a_file_is_no_dataset(tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match="is a file or a script") as caught:
        load(tmp_path, hub="d.jsonl")
    assert "train.data.jsonl" in str(caught.value.hint)


def test_a_directory_with_the_name_of_a_reader_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    write_rows(tmp_path / "json" / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    assert load(tmp_path, hub="json")[0].prompt == "a"


@pytest.mark.parametrize("name", ["../none", "/none/none", "a/b/c", "file:///etc", "hf://datasets/x/y"])
def test_paths_that_are_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="no such directory"):
        load(tmp_path, hub=name)


def test_pipes_and_devices_in_a_directory(tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    os.mkfifo(folder / "train.jsonl")
    with pytest.raises(DataError, match="not a file but a device, a pipe or a socket"):
        load(tmp_path, hub="sets")
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="not a file but a device, a pipe or a socket"):
        load(tmp_path, hub="sets")


def test_other_formats_are_refused(tmp_path: Path) -> None:
    import tarfile

    folder = tmp_path / "sets"
    folder.mkdir()
    write_rows(tmp_path / "000.json", [{"prompt": "a"}])
    with tarfile.open(folder / "train.tar", "w") as archive:
        archive.add(tmp_path / "000.json", "000.json")
    with pytest.raises(DataError, match="read by 'webdataset'; expected JSON"):
        load(tmp_path, hub="sets")


# ------------------------------------------------------------------------------------- small files, much text


def write_parquet(file: Path, rows: int, text_bytes: int) -> None:
    """Rows that share one text: a few KB on the disk."""
    import pyarrow as pa
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    texts = pa.array(["x" * text_bytes] * rows, pa.large_string())
    table = pa.table({"prompt": [f"q{i}" for i in range(rows)], "completion": texts})
    parquet.write_table(table, file, compression="zstd", row_group_size=rows)


def test_a_limit_is_all_that_is_read(tmp_path: Path, cache: Path) -> None:
    """158 KB became 1.1 GiB of cache."""
    write_parquet(tmp_path / "sets" / "data" / "train-0.parquet", 1100, MIB)
    assert (tmp_path / "sets" / "data" / "train-0.parquet").stat().st_size < 200_000
    code = (
        "import resource, sys\nfrom pathlib import Path\nimport datasets, pyarrow.parquet\n"
        f"datasets.config.HF_DATASETS_CACHE = Path({str(cache)!r})\n"
        "from soka_serve.data.examples import DataReader\nfrom soka_serve.manifest.schema import Data\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\nbefore = peak()\n"
        f"data = Data(hub='sets', limit=8)\nplace = Path({str(tmp_path)!r})\n"
        "found = DataReader(data, place).examples('train')\n"
        "print(len(found), len(found[-1].completion), peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, length, mib = map(int, done.stdout.split())
    assert (count, length) == (8, MIB)
    assert mib < 200
    assert sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()) < 10_000_000 if cache.exists() else True


def test_text_out_of_proportion_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "sets" / "train.parquet", 1100, MIB)
    rows = hub_rows(Data(hub="sets"), "train", tmp_path, stream=False)
    with pytest.raises(DataError, match="bytes of files became more than") as caught:
        for _ in rows:
            pass
    assert "train.data.limit" in str(caught.value.hint)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # and the process is still there


def test_parquet_rows_are_those_of_the_library(tmp_path: Path) -> None:
    import datetime

    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {"prompt": f"q{i}", "completion": None if i == 3 else "é" * i, "n": i, "when": datetime.datetime(2024, 1, 1, i)}
        | {"messages": [{"role": "user", "content": f"m{i}"}], "score": i / 3, "tags": ["a", "b"][: i % 3]}
        for i in range(9)
    ]
    folder = tmp_path / "sets"
    folder.mkdir()
    parquet.write_table(pa.Table.from_pylist(rows[:5]), folder / "train-0.parquet", row_group_size=2)
    parquet.write_table(pa.Table.from_pylist(rows[5:]), folder / "train-1.parquet")
    ours = [row for _, row in hub_rows(Data(hub="sets"), "train", tmp_path, stream=False)]
    theirs = list(datasets.load_dataset(str(folder), split="train"))
    assert ours == theirs == rows


@pytest.mark.parametrize("name", ["train.csv", "train.txt", "train.jsonl", "train.arrow", "train.parquet"])
def test_every_format_is_read(tmp_path: Path, name: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    folder = tmp_path / "sets"
    folder.mkdir()
    table = pa.table({"text": ["one", "two"]})
    if name == "train.arrow":
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table)
    elif name == "train.parquet":
        parquet.write_table(table, folder / name)
    elif name == "train.jsonl":
        write_rows(folder / name, table.to_pylist())
    else:
        (folder / name).write_text("text\none\ntwo\n" if name == "train.csv" else "one\ntwo\n")
    assert [e.prompt for e in load(tmp_path, hub="sets", prompt="{{ text }}", completion="x")] == ["one", "two"]


# ------------------------------------------------------------------------------------- JSON Lines


def test_a_hole_is_no_data(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.touch()
    os.truncate(file, 1 << 40)
    for act in (
        lambda: load(tmp_path, jsonl="d.jsonl"),
        lambda: data_sha256(Data(jsonl="d.jsonl"), manifest_dir=tmp_path),
    ):
        with pytest.raises(DataError, match="a hole"):
            act()


def test_a_line_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "' + b"a" * (65 * MIB))
    with pytest.raises(DataError, match=r"d\.jsonl:2: a line of more than 64 MiB"):
        load(tmp_path, jsonl="d.jsonl")
    assert load(tmp_path, jsonl="d.jsonl", limit=1)[0].prompt == "a"


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": ' + "1" * 5_000 + "}"], ids=["depth", "digits"])
def test_lines_that_json_does_not_take(tmp_path: Path, line: str) -> None:
    (tmp_path / "d.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"d\.jsonl:1: malformed JSON"):
        load(tmp_path, jsonl="d.jsonl")


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "pipe"])
def test_pipes_and_devices_as_data(tmp_path: Path, place: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a file but a device"):
        DataReader(Data(jsonl=place), tmp_path).examples("train")


def test_files_of_a_dataset_that_differ(tmp_path: Path) -> None:
    """What fails after the first row is the data's fault, too."""
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "1.jsonl", [{"q": "x", "a": "y"}] * 3)
    (tmp_path / "data" / "2.json").write_text('{"other": 1}')
    with pytest.raises(DataError, match=r"train\.data\.hub: data: row 4: .*CastError"):
        load(tmp_path, hub="data", prompt="{{ q }}", completion="{{ a }}")


def test_files_that_are_holes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", [{"q": "x", "a": "y"}])
    os.truncate(tmp_path / "data" / "train.jsonl", 3 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"train\.jsonl: a hole: 3221225472 bytes long, of which 4096"):
        load(tmp_path, hub="data", prompt="{{ q }}", completion="{{ a }}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10
