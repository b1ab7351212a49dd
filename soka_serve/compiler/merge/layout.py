"""What a merge writes into which file, worked out before anything is written; then several files at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from soka_serve.adapter.format import Adapter
from soka_serve.base.base import Base
from soka_serve.base.checkpoint import INDEX_FILE
from soka_serve.compiler.merge.files import can_write_direct
from soka_serve.compiler.merge.resume import MergeJournal
from soka_serve.compiler.merge.stream import plan_file, single_threaded_torch, write_file
from soka_serve.errors import BuildError
from soka_serve.io.files import flush, sha256_file, write_text_atomic
from soka_serve.io.leftovers import stale_bytes
from soka_serve.io.progress import track
from soka_serve.io.safetensors import STORED_NAMES, TensorInfo
from soka_serve.io.stamps import FileStamps
from soka_serve.kron import Factors

if TYPE_CHECKING:
    from soka_serve.base.model import Quantize

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_THREADS = 4  # files in work at once; each waits for the disk now and then


class MergeLayout:
    """The files of a merged model: which tensors each holds, at which bytes, and what is added to them.

    Args:
        base: gives the files, their tensors and their order.
        adapters: with their weights.
        dtype: of all floating tensors; "auto" keeps each one's own.

    Raises:
        CheckpointError: the adapters add to a base in bits, and a weight that it holds so is no tensor of its own.
        BuildError: the same, and bitsandbytes is not installed.
    """

    def __init__(self, base: Base, adapters: Sequence[tuple[Adapter, float]], dtype: Dtype) -> None:
        self.base, self.checkpoint = base, base.checkpoint
        self.held = _held_tensors(base, adapters[0][0].quantize)
        self.adapted: dict[str, list[tuple[Factors, float]]] = {}
        for adapter, weight in adapters:
            for module in adapter.factors:
                tensor = base.weights.get(module).name
                self.adapted.setdefault(tensor, []).append((adapter.exact_delta(module), weight))
        by_file: dict[Path, list[TensorInfo]] = {file: [] for file in self.checkpoint.files}
        for info in self.checkpoint.tensors.values():
            by_file[info.file].append(info)
        name = STORED_NAMES.get(dtype, "auto")
        self.files = {file: plan_file(infos, name, self.adapted, self.held) for file, infos in by_file.items() if infos}
        self.total_bytes = sum(plan.size for plan in self.files.values())

    @property
    def changes_dtype(self) -> bool:
        """Whether any tensor gets another dtype than it has."""
        return any(p.dtype != p.info.dtype for plan in self.files.values() for p in plan.pieces)

    def check_space(self, out: Path) -> None:
        """Raise BuildError when the disk has no room: before the work rather than at its end."""
        place = next(p for p in (out, *out.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(place).free + stale_bytes(out)  # what a killed run has left is taken over or removed
        if free < self.total_bytes:
            raise BuildError(
                f"cannot write {out}: the merged model takes {self.total_bytes:,} bytes, the disk has {free:,} free",
                hint="free some space on that disk, or write somewhere else",
            )

    def fits_memory(self) -> bool:
        """Whether the machine's memory holds the base's files and the merged ones."""
        size = sum(file.stat().st_size for file in self.files) + self.total_bytes
        return size < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def write_index(self, new: Path) -> None:
        """Write the index, where the base has one."""
        said = self.base.folder.json(INDEX_FILE)
        if not said:
            return
        tensors = self.checkpoint.tensors
        # In the base's order; where that names what is not there, or elsewhere, as it is written here.
        order = dict.fromkeys([*said.get("weight_map", {}), *tensors])
        metadata = said.get("metadata")  # some checkpoints have none, or null
        size = sum(piece.end - piece.start for plan in self.files.values() for piece in plan.pieces)
        content = {
            **said,
            "weight_map": {name: tensors[name].file.name for name in order if name in tensors},
            "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": size},
        }
        write_text_atomic(new / INDEX_FILE, json.dumps(content, indent=2) + "\n")


def _held_tensors(base: Base, quantize: str | None) -> dict[str, Quantize]:
    """By tensor name, the bits that a base which adapters add to computes with in its place."""
    if quantize is None:
        return {}
    from soka_serve.base.held import held_modules

    bits = cast("Quantize", quantize)
    return {base.weights.get(module).name: bits for module in sorted(held_modules(base.directory, bits))}


def write_layout(layout: MergeLayout, new: Path, finished: MergeJournal, *, hashed: bool, progress: bool) -> str | None:
    """Write all weight files and the index.

    Args:
        layout: what goes where.
        new: folder of the new files.
        finished: what an interrupted run has left, and the journal of this one.
        hashed: hash the base on the way.
        progress: show progress.

    Returns:
        The sha256 of the base's weights if `hashed`.
    """
    checkpoint = layout.checkpoint
    unchanged = FileStamps(checkpoint.files)
    with (
        track(layout.total_bytes, "merge", unit="B", enabled=progress) as advance,
        single_threaded_torch(),
        ThreadPoolExecutor(1) as flusher,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        _MergeWriter(layout, new, finished, hashed=hashed, advance=advance).run(pool, flusher)
    layout.write_index(new)
    known = dict(finished.files)
    finished.close(new)
    digest = checkpoint.sha256(lambda file: known.get(file.name) or sha256_file(file)) if hashed else None
    unchanged.check()
    return digest


class _MergeWriter:
    """The weight files of one merge, being written by several threads."""

    def __init__(
        self,
        layout: MergeLayout,
        new: Path,
        finished: MergeJournal,
        *,
        hashed: bool,
        advance: Callable[[str, int], None],
    ) -> None:
        self.layout, self.new, self.finished, self.advance = layout, new, finished, advance
        self.digests = {f: hashlib.sha256() for f, plan in layout.files.items() if hashed and plan.keeps_order()}
        self.direct = not layout.fits_memory() and can_write_direct(new)
        self.stop, self.lock = threading.Event(), threading.Lock()

    def run(self, pool: ThreadPoolExecutor, flusher: ThreadPoolExecutor) -> None:
        """Write the files that are not finished; the first error stops the others, and is raised."""
        futures: list[Future[None]] = []
        flushed: list[Future[None]] = []

        def work(file: Path) -> None:
            self._write(file)
            # The disk works on this file while the next one is computed.
            flushed.append(flusher.submit(self._finish, file))

        try:
            for file, plan in self.layout.files.items():
                if file.name in self.finished.files:
                    self._count(file, plan.size)
                else:
                    futures.append(pool.submit(work, file))
            wait(futures, return_when=FIRST_EXCEPTION)
            if not all(future.done() for future in futures):
                self.stop.set()
            _raise_first(futures)
            _raise_first(flushed)
        finally:  # after Ctrl-C as after an error, nothing more is begun
            self.stop.set()
            for future in (*futures, *flushed):
                future.cancel()

    def _write(self, file: Path) -> None:
        write_file(
            self.new / file.name,
            self.layout.files[file],
            advance=lambda size: self._count(file, size),
            stop=self.stop,
            digest=self.digests.get(file),
            direct=self.direct,
        )

    def _count(self, file: Path, size: int) -> None:
        with self.lock:
            self.advance(file.name, size)

    def _finish(self, file: Path) -> None:
        flush(self.new / file.name)
        self.finished.add(self.new, file.name, self.digests[file].hexdigest() if file in self.digests else "")


def _raise_first(futures: Sequence[Future[None]]) -> None:
    """Wait for all; raise what the first of them has raised that was not merely stopped."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, CancelledError)):
        raise error
