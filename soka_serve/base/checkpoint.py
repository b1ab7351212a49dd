"""Checkpoints: config, shards and index, one tensor at a time, and content hashes.

Nothing here imports torch at import time; `Checkpoint.read` does when it is called.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soka_serve.base.folder import ModelFolder
from soka_serve.base.optional_tensors import is_optional
from soka_serve.errors import CheckpointError, first_ten, joined, name_some
from soka_serve.io.files import read_errors, sha256_file
from soka_serve.io.json_files import FETCH_AGAIN
from soka_serve.io.safetensors import PICKLE_SUFFIXES, TensorInfo, read_header, read_tensor
from soka_serve.io.warn_once import warn

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def check_directory(directory: Path) -> None:
    """Raise CheckpointError unless `directory` is one."""
    if not directory.exists():
        raise CheckpointError(f"{directory}: no such directory", hint="give the directory of a Hugging Face checkpoint")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a directory", hint="give the directory that holds config.json")


def list_shards(folder: ModelFolder) -> tuple[list[Path], dict[str, Any]]:
    """The weight files of a checkpoint and, if it is sharded, what its index says; else {}.

    `model.safetensors` wins over an index, as in transformers.

    Raises:
        CheckpointError: no safetensors (with a hint on converting where there are pickles), malformed index, missing
            shards; everything that is wrong at once.
    """
    directory = folder.directory
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists():
        if index.exists():
            log.info("%s: has %s and an index; the single file is read, as in transformers", directory, SINGLE_FILE)
        return [single], {}
    if not index.exists():
        pickles = sorted(f.name for f in directory.iterdir() if f.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(
                f"{directory}: the weights are pickles ({', '.join(pickles[:3])}), which can run code when loaded; "
                "only safetensors are read",
                hint="convert once where you trust the file: AutoModelForCausalLM.from_pretrained(DIR)"
                ".save_pretrained(NEW_DIR) writes safetensors",
            )
        raise CheckpointError(
            f"{directory}: no weights: expected {SINGLE_FILE} or {INDEX_FILE}",
            hint="give the directory that holds a checkpoint's safetensors files",
        )
    content = folder.json(INDEX_FILE)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a non-empty object `weight_map`", hint=FETCH_AGAIN)
    wrong = [
        f"{index}: {name}: expected the name of a file beside the index, got {file!r}"
        for name, file in weight_map.items()
        if not isinstance(file, str) or Path(file).name != file
    ]
    if not wrong:
        names = sorted(set(weight_map.values()))
        wrong = [
            f"{directory / name}: missing, though {INDEX_FILE} names it"
            for name in names
            if not (directory / name).exists()
        ]
    if wrong:
        raise CheckpointError(
            "\n".join(wrong), hint="fetch the missing files; an interrupted download leaves such gaps"
        )
    return [directory / name for name in names], content


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint directory, opened by reading config.json and the headers only.

    `index` is what the index of a sharded checkpoint says; {} where there is one file.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: list[Path]
    index: dict[str, Any]

    @classmethod
    def open(cls, directory: Path, folder: ModelFolder | None = None) -> Checkpoint:
        """Read config.json and the safetensors headers.

        Args:
            directory: of the checkpoint.
            folder: the same with its files; default: they are read here.

        Raises:
            CheckpointError: everything that is wrong with the directory, its config, index and shards, in one.
        """
        check_directory(directory)
        folder = folder or ModelFolder(directory)
        problems: list[CheckpointError] = []
        config: dict[str, Any] = {}
        try:
            config = folder.config
        except CheckpointError as error:
            problems.append(error)
        files: list[Path] = []
        index: dict[str, Any] = {}
        try:
            files, index = list_shards(folder)
        except CheckpointError as error:
            problems.append(error)
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            try:
                header = read_header(file)
            except CheckpointError as error:
                problems.append(error)
                continue
            for name in sorted(header.keys() & tensors.keys()):
                problems.append(
                    CheckpointError(f"{directory}: {name} is in both {tensors[name].file.name} and {file.name}")
                )
            tensors.update(header)
        if index and not problems:
            problems += _compare_with_index(directory, config, index["weight_map"], tensors)
        if problems:
            message, hint = joined(problems)
            raise CheckpointError(message, hint=hint or FETCH_AGAIN)
        return cls(directory, config, tensors, files, index)

    def index_problem(self) -> str | None:
        """Why transformers cannot read the index, which everything here can; None where it can, or needs none."""
        metadata = self.index.get("metadata")
        if not self.index or isinstance(metadata, dict):
            return None
        what = "missing" if metadata is None else "no object"
        return f"{self.directory / INDEX_FILE}: `metadata` is {what}, which transformers needs"

    def check_loadable(self) -> None:
        """Raise CheckpointError where transformers would fail on a checkpoint that is otherwise whole."""
        if (problem := self.index_problem()) is not None:
            raise CheckpointError(problem, hint='write "metadata": {} into it, beside "weight_map"')

    def info(self, name: str) -> TensorInfo:
        """The header entry of one tensor; CheckpointError if there is none."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory}: no tensor {name}", hint="is this the adapter's own base model?")
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its own dtype and memory; nothing else is loaded or mapped.

        Raises:
            CheckpointError: no such tensor, or the file ends early.
        """
        return read_tensor(self.info(name))

    def sha256(self, hash_file: Callable[[Path], str] = sha256_file) -> str:
        """Hex sha256 of the weights: names and contents of the weight files. config.json does not count.

        Args:
            hash_file: hex sha256 of one file; pass one that remembers what it hashed before.

        Raises:
            CheckpointError: a file cannot be read.
        """

        def hashed(file: Path) -> str:
            with read_errors(file):
                return hash_file(file)

        # Hashing releases the interpreter's lock, so shards are hashed side by side.
        with ThreadPoolExecutor(max_workers=2) as pool:
            digests = list(pool.map(hashed, self.files))
        lines = sorted(f"{digest}  {file.name}\n" for digest, file in zip(digests, self.files, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _compare_with_index(
    directory: Path, config: Mapping[str, Any], weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> list[CheckpointError]:
    """What the index names that the model needs and no file holds; what else is wrong with it harms nobody."""
    index = directory / INDEX_FILE
    absent = [name for name in weight_map if name not in tensors]
    needed = [name for name in absent if not is_optional(name, config)]
    if spare := sorted(set(absent) - set(needed)):
        log.info("%s: names %s, which no file holds and the model does not need", index, name_some(spare))
    there = {name: file for name, file in weight_map.items() if name in tensors}
    if moved := sorted(name for name, file in there.items() if tensors[name].file.name != file):
        warn(
            log,
            "%s: names %s for %s, which is in %s, and is read from there%s",
            index,
            weight_map[moved[0]],
            moved[0],
            tensors[moved[0]].file.name,
            f"; {len(moved) - 1} more like it" if len(moved) > 1 else "",
        )
    if unnamed := sorted(tensors.keys() - weight_map.keys()):
        warn(log, "%s: %d tensors are not in the index, %s for one", directory, len(unnamed), unnamed[0])
    lines = first_ten([f"{index}: names {name} in {weight_map[name]}, which does not hold it" for name in needed])
    hint = f"{FETCH_AGAIN}; or take out of `weight_map` what the model has no such tensor for"
    return [CheckpointError("\n".join(lines), hint=hint)] if lines else []
