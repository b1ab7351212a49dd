"""Rows of hub datasets, and of local directories in a hub's layout.

The `datasets` library is imported when rows are asked for. Only its readers of plain data are used: what a manifest
names may come from anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from soka_serve.data.rows import Row, UnreachableDataError, open_data, resolve
from soka_serve.errors import DataError, printable
from soka_serve.manifest.schema import Data

# Readers of `datasets` that give rows of text and numbers; "cache" is a dataset that was fetched before.
_FORMATS = ("json", "csv", "parquet", "arrow", "text", "cache")
# Readers that `datasets` also takes for a dataset's name. All of its versions' are here, and its own list is asked.
_READERS = {
    *_FORMATS, "pandas", "generator", "spark", "sql", "webdataset", "xml", "hdf5", "eval", "lance", "iceberg", "conll",
    "imagefolder", "audiofolder", "videofolder", "pdffolder", "niftifolder", "meshfolder", "harbor",
}  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_BATCH = 256  # rows of a Parquet file read at once
# Rows of a local directory may hold so many characters of text, and more only within so many times its files' bytes.
_MAX_TEXT, _MAX_GROWTH = 1 << 30, 200


def hub_rows(
    data: Data, split: str, manifest_dir: Path, stream: bool, limit: int | None = None
) -> Iterator[tuple[str, Row]]:
    """Rows of a hub dataset, or of a local directory of that name.

    Args:
        data: names the dataset.
        split: of the dataset.
        manifest_dir: relative paths start here.
        stream: read it without downloading it whole.
        limit: how many rows will be asked for; a hub dataset is then read that far only, too.

    A directory is always read as it is, and never copied to the cache of `datasets`.

    Raises:
        DataError: the name is that of a reader, a script or a file; a format other than JSON, CSV, Parquet, Arrow and
            text; text out of all proportion to the files.
        UnreachableDataError: no such dataset, configuration or split, or a hub that cannot be reached.
    """
    name = str(data.hub)
    local = resolve(manifest_dir, name)
    import datasets

    check_name(name, local)
    is_local = local.is_dir()
    # Offline there is only the local cache, which holds datasets whole.
    stream = is_local or ((stream or limit is not None) and not datasets.config.HF_HUB_OFFLINE)
    try:
        builder = datasets.load_dataset_builder(
            str(local.absolute()) if is_local else name, name=data.config, revision=None if is_local else data.revision
        )
        _check_format(name, builder)
        iterator = iter(_rows_of(builder, split, local=is_local, stream=stream, limit=limit))
        first = next(iterator, None)
    except DataError:
        raise
    except Exception as error:
        raise UnreachableDataError(
            f"hub dataset '{name}' (config {data.config or 'default'}, split '{split}', revision "
            f"{data.revision or 'newest'}): {type(error).__name__}: {error}",
            hint=_hub_hint(error),
        ) from error
    whole = iterator if first is None else chain([first], iterator)
    rows = _within(_readable(whole, name), local, name) if is_local else _readable(whole, name)
    for index, row in enumerate(rows):
        yield f"{name}[{split}][{index}]", row


def check_name(name: str, local: Path) -> None:
    """Refuse what `datasets` would take for something else than a dataset, and a directory with anything but files.

    Args:
        name: `train.data.hub`.
        local: the path that it is, where it is one.

    Raises:
        DataError: says what was expected.
    """
    expected = "expected a hub id (OWNER/NAME), or a directory with data files"
    if local.is_dir():
        if (local / f"{local.name}.py").exists():
            raise DataError(
                f"train.data.hub: {name}: a dataset script, {local.name}.py, is in it; scripts are never run",
                hint="Save the dataset as Parquet or JSON Lines.",
            )
        for path in local.rglob("*"):
            if path.exists() and not path.is_file() and not path.is_dir():
                raise DataError(f"train.data.hub: {path}: not a file but a device, a pipe or a socket")
            if path.is_file():
                with open_data(path):  # refuses what a reader could not take, such as a file that is mostly a hole
                    pass
        return
    if local.exists() or name.endswith(".py"):
        raise DataError(
            f"train.data.hub: {name!r} is a file or a script; {expected}",
            hint="A file of one JSON object per line is train.data.jsonl.",
        )
    if name.lower() in _readers():
        raise DataError(
            f"train.data.hub: {name!r} is a reader of the datasets library, not a dataset; {expected}",
            hint="Files of your own are read from their directory, or by train.data.jsonl.",
        )
    if not _HUB_ID.fullmatch(name):
        raise UnreachableDataError(
            f"train.data.hub: {name}: no such directory; {expected}",
            hint="Paths in a manifest start from the manifest's directory.",
        )


def _readers() -> set[str]:
    from datasets import packaged_modules

    return _READERS | set(getattr(packaged_modules, "_PACKAGED_DATASETS_MODULES", ()))


def _check_format(name: str, builder: Any) -> None:
    """Refuse readers that do more than read text and numbers, such as those of pickles."""
    place, _, kind = type(builder).__module__.rpartition(".")
    if not place.startswith("datasets.packaged_modules") or kind not in _FORMATS:
        raise DataError(
            f"train.data.hub: {name}: its files are read by {kind!r}; expected JSON, CSV, Parquet, Arrow or text files",
            hint="Save the dataset as Parquet or JSON Lines.",
        )


def _rows_of(builder: Any, split: str, *, local: bool, stream: bool, limit: int | None) -> Iterator[Row]:
    files = (getattr(builder.config, "data_files", None) or {}).get(split)
    if local and files and type(builder).__module__.endswith(".parquet"):
        return chain.from_iterable(_parquet_rows(Path(file)) for file in files)
    if not stream:
        builder.download_and_prepare()
        return iter(builder.as_dataset(split=split))
    if hasattr(builder.config, "batch_size"):
        builder.config.batch_size = min(limit or _BATCH, _BATCH)
    rows: Iterator[Row] = iter(builder.as_streaming_dataset(split=split))
    return rows


def _parquet_rows(file: Path) -> Iterator[Row]:
    """Rows of a Parquet file, one by one: a text that many rows share is in memory once.

    Raises:
        DataError: a row group that would be out of all proportion to the file.
    """
    import pyarrow as pa
    from pyarrow import parquet

    with parquet.ParquetFile(file) as opened:
        schema = opened.schema_arrow
        bytes_of = [opened.metadata.row_group(i).total_byte_size for i in range(opened.num_row_groups)]
    if max(bytes_of, default=0) > max(_MAX_TEXT, _MAX_GROWTH * file.stat().st_size):
        raise DataError(
            f"{file}: {file.stat().st_size:,} bytes that would become {max(bytes_of):,} in memory",
            hint="Save it again in smaller row groups.",
        )
    texts = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    with parquet.ParquetFile(file, read_dictionary=texts) as opened:
        for batch in opened.iter_batches(batch_size=_BATCH, use_threads=False):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            for index in range(batch.num_rows):
                yield {name: column[index].as_py() for name, column in columns.items()}


def _readable(rows: Iterator[Row], name: str) -> Iterator[Row]:
    """The rows; whatever the reader of the files raises on its way to one is a DataError."""
    index = 0
    try:
        for index, row in enumerate(rows, 1):  # noqa: B007 - for the message
            yield row
    except DataError:
        raise
    except Exception as error:
        what = printable(" ".join(str(error).split()), 300)
        raise DataError(
            f"train.data.hub: {name}: row {index + 1}: cannot be read: {type(error).__name__}: {what}",
            hint="All files of a dataset need the same columns, with values of the same kind.",
        ) from error


def _within(rows: Iterator[Row], directory: Path, name: str) -> Iterator[Row]:
    """The rows, as long as their text is in proportion to the files that it comes from."""
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    most = max(_MAX_TEXT, _MAX_GROWTH * size)
    total = 0
    for row in rows:
        total += text_length(row)
        if total > most:
            raise DataError(
                f"train.data.hub: {name}: {size:,} bytes of files became more than {most:,} characters of text",
                hint="Set train.data.limit to read the first rows only.",
            )
        yield row


def text_length(value: object) -> int:
    """Characters of all text in a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(text_length, value.values()))
    return sum(map(text_length, value)) if isinstance(value, list | tuple) else 0


def _hub_hint(error: Exception) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if "gated" in text or "401" in text or "403" in text:
        return "Ask for access on the dataset's page, then log in: hf auth login."
    if "split" in text or "config" in text:
        return "Check train.data.split and train.data.config against the dataset's page."
    return (
        "Check the id and the network (HF_HUB_OFFLINE must be unset to download), or give a local directory or a "
        "JSON Lines file (train.data.jsonl)."
    )
