"""`soka-serve merge`: base + sum(weight * delta) as an ordinary dense model, streamed shard by shard."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from soka_serve.adapter.format import Adapter, check_against
from soka_serve.adapter.source import read_source
from soka_serve.base.checkpoint import INDEX_FILE, Checkpoint, index_problem
from soka_serve.base.foreign_code import check_no_code
from soka_serve.base.optional_tensors import ties_embeddings
from soka_serve.base.plain_weights import check_plain_weights
from soka_serve.base.read_modules import weights_of
from soka_serve.base.weight_map import WeightMap
from soka_serve.compiler.merge.files import can_write_direct
from soka_serve.compiler.merge.papers import MERGED, copy_side_files, write_papers
from soka_serve.compiler.merge.resume import Finished, merge_key
from soka_serve.compiler.merge.stream import keeps_order, plan_file, single_threaded_torch, write_file
from soka_serve.errors import BuildError, CheckpointError, SokaError, joined
from soka_serve.io.files import flush, replace_directory, sha256_file, write_text_atomic
from soka_serve.io.json_files import read_json
from soka_serve.io.leftovers import stale_bytes
from soka_serve.io.progress import track
from soka_serve.io.safetensors import TensorInfo
from soka_serve.io.unchanged import Unchanged
from soka_serve.kron import Factors

log = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Verify = bool | Literal["auto", "logits", "tensors"]

_TORCH_TO_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_LOGITS_LIMIT_BYTES = 2 << 30
_THREADS = 4  # files in work at once; each waits for the disk now and then


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote.

    `max_error_ulp` is the largest distance that the verification found between a merged value and base + delta in
    float64, in units of the last place of the output's dtype; None when nothing was verified. `logits_error` is the
    largest difference of a log-probability (nats) between the merged model and base + adapter; None when the logits
    were not compared.
    """

    out: Path
    modules: int
    tensors: int
    bytes_written: int
    dtype: str
    seconds: float
    verified: tuple[str, ...]
    max_error_ulp: float | None
    logits_error: float | None

    def to_text(self) -> str:
        """A few lines for people."""
        checks = []
        if self.max_error_ulp is not None:
            checks.append(f"weights within {self.max_error_ulp:.2f} ulp of base + delta")
        if self.logits_error is not None:
            checks.append(f"log-probabilities within {self.logits_error:.1e} nats of base + adapter")
        return (
            f"merged      {self.out}\n"
            f"modules     {self.modules} of {self.tensors} tensors changed\n"
            f"size        {self.bytes_written:,} bytes, dtype {self.dtype}, {self.seconds:.1f} s\n"
            f"verified    {'; '.join(checks) or 'no'}"
        )


def merge(
    adapter: Path | Sequence[tuple[Path, float]],
    *,
    base: Path,
    out: Path,
    dtype: Dtype = "auto",
    verify: Verify = "auto",
    allow_other_base: bool = False,
    progress: bool = True,
) -> MergeResult:
    """Write W + sum(weight * delta) for every adapted weight, and every other tensor as it is.

    Semantics: merged[name] = W + sum over adapters of weight * delta, summed in float32 (float64 for a float32
    output) and rounded once to the output's dtype.

    The base is read in blocks of a few MiB; tensors that no adapter touches are copied byte for byte. The
    result has the base's shards, index, config, tokenizer and generation config, and loads in any engine. It replaces
    an earlier merged model in `out` as a whole; anything else there is refused before any work. Pickles, code and other
    files of the base stay behind. After a kill, finished files are taken over.

    Args:
        adapter: an adapter directory, or several with weights. Training checkpoints count with trained - initial.
        base: directory of the base checkpoint.
        out: directory of the merged model.
        dtype: of all floating tensors; "auto" keeps each one's own.
        verify: "tensors" recomputes a sample in float64; "logits" does that, reloads the model with transformers and
            compares it with base + adapter through PEFT; "auto" (or True) takes "logits" below 2 GiB; False: nothing.
        allow_other_base: merge although an adapter's soka.lock names other base weights.
        progress: show progress.

    Raises:
        CheckpointError: base or adapter are damaged or do not fit each other, or a sum overflows the dtype.
        BuildError: the disk is full and the like, or the verification failed; `out` is then as it was.
    """
    started = time.monotonic()
    chosen = [(adapter, 1.0)] if isinstance(adapter, Path) else list(adapter)
    if not chosen:
        raise CheckpointError("no adapter to merge", hint="give at least one adapter directory")
    MERGED.check(out, keep=[base, *(path for path, _ in chosen)])
    checkpoint = Checkpoint.open(base)
    check_plain_weights(base, checkpoint.tensors)
    sources = [(read_source(path), weight) for path, weight in chosen]
    adapters = [(source.adapter, weight) for source, weight in sources]
    weights = weights_of(checkpoint)
    _check_fit(checkpoint, weights, adapters)
    layout = _Layout(checkpoint, weights, adapters, dtype)
    layout.check_space(out)
    reason = _no_logits(verify, layout, chosen) if verify is not False else None
    expected = {s.adapter.directory: sha for s, _ in sources if (sha := s.base_sha256) is not None}
    hashed = bool(expected) and not allow_other_base
    finished = Finished(merge_key(checkpoint, sources, dtype, hashed=hashed))
    with replace_directory(out, foreign=MERGED.foreign, adopt=finished.adopt) as new:
        base_sha256 = layout.write(new, finished, hashed=hashed, progress=progress)
        if base_sha256 is not None:
            _check_base_hash(checkpoint, expected, base_sha256)
        named = adapters[0][0].base_model
        copied = copy_side_files(checkpoint, new, dtype if layout.changes_dtype else None, named)
        log.debug("copied beside the weights: %s", ", ".join(copied))
        write_papers(new, checkpoint, sources, dtype, base_sha256)
        verified: tuple[str, ...] = ()
        ulp = nats = None
        if verify is not False:
            from soka_serve.compiler.merge.verify import verify_logits, verify_tensors

            ulp, verified = verify_tensors(new, checkpoint, weights, adapters), ("tensors",)
            if reason is None:
                nats = verify_logits(new, checkpoint.directory, chosen[0][0])
                verified = ("tensors", "logits") if nats is not None else verified
            else:
                log.info("verify: logits are not compared (%s)", reason)
    return MergeResult(
        out=out,
        modules=len(layout.adapted),
        tensors=len(checkpoint.tensors),
        bytes_written=layout.total_bytes,
        dtype=dtype,
        seconds=time.monotonic() - started,
        verified=verified,
        max_error_ulp=ulp,
        logits_error=nats,
    )


class _Layout:
    """What goes into which file, worked out before anything is written."""

    def __init__(
        self, checkpoint: Checkpoint, weights: WeightMap, adapters: Sequence[tuple[Adapter, float]], dtype: Dtype
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.adapted: dict[str, list[tuple[Factors, float]]] = {}
        for adapter, weight in adapters:
            for module in adapter.factors:
                tensor = weights.get(module).name
                self.adapted.setdefault(tensor, []).append((adapter.delta_factors(module), weight))
        by_file: dict[Path, list[TensorInfo]] = {file: [] for file in checkpoint.files}
        for info in checkpoint.tensors.values():
            by_file[info.file].append(info)
        name = _TORCH_TO_SAFETENSORS.get(dtype, "auto")
        self.files = {file: plan_file(infos, name, self.adapted) for file, infos in by_file.items() if infos}
        self.total_bytes = sum(pieces[-1].end for _, pieces in self.files.values())

    @property
    def changes_dtype(self) -> bool:
        """Whether any tensor gets another dtype than it has."""
        return any(p.dtype != p.info.dtype for _, pieces in self.files.values() for p in pieces)

    def check_space(self, out: Path) -> None:
        """Raise BuildError when the disk has no room: before the work rather than at its end."""
        place = next(p for p in (out, *out.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(place).free + stale_bytes(out)  # what a killed run has left is taken over or removed
        if free < self.total_bytes:
            raise BuildError(
                f"cannot write {out}: the merged model takes {self.total_bytes:,} bytes, the disk has {free:,} free",
                hint="free some space on that disk, or write somewhere else",
            )

    def write(self, new: Path, finished: Finished, *, hashed: bool, progress: bool) -> str | None:
        """Write all weight files and the index; returns the sha256 of the base's weights if `hashed`."""
        unchanged = Unchanged(self.checkpoint.files)
        digests = {file: hashlib.sha256() for file in self.files if hashed and keeps_order(self.files[file][1])}
        size = sum(file.stat().st_size for file in self.files) + self.total_bytes
        direct = not _fits_memory(size) and can_write_direct(new)
        stop, lock = threading.Event(), threading.Lock()
        flushed: list[Future[None]] = []
        with (
            track(self.total_bytes, "merge", unit="B", enabled=progress) as advance,
            single_threaded_torch(),
            ThreadPoolExecutor(1) as flusher,
            ThreadPoolExecutor(_THREADS) as pool,
        ):

            def work(file: Path) -> None:
                def count(size: int) -> None:
                    with lock:
                        advance(file.name, size)

                header, pieces = self.files[file]
                target = new / file.name
                write_file(target, header, pieces, advance=count, stop=stop, digest=digests.get(file), direct=direct)
                # The disk works on this file while the next one is computed.
                flushed.append(flusher.submit(finish, file))

            def finish(file: Path) -> None:
                flush(new / file.name)
                finished.add(new, file.name, digests[file].hexdigest() if file in digests else "")

            futures: list[Future[None]] = []
            try:
                for file, (_, pieces) in self.files.items():
                    if file.name in finished.files:
                        with lock:
                            advance(file.name, pieces[-1].end)
                    else:
                        futures.append(pool.submit(work, file))
                wait(futures, return_when=FIRST_EXCEPTION)
                if not all(future.done() for future in futures):
                    stop.set()
                _raise_first(futures)
                _raise_first(flushed)
            finally:  # after Ctrl-C as after an error, nothing more is begun
                stop.set()
                for future in (*futures, *flushed):
                    future.cancel()
        index = self.checkpoint.directory / INDEX_FILE
        if len(self.checkpoint.files) > 1 or index.exists():
            content = read_json(index)
            size = sum(p.end - p.start for _, pieces in self.files.values() for p in pieces)
            # In the base's order; where that names what is not there, or elsewhere, as it is written here.
            order = dict.fromkeys([*content.get("weight_map", {}), *self.checkpoint.tensors])
            content["weight_map"] = {
                name: self.checkpoint.tensors[name].file.name for name in order if name in self.checkpoint.tensors
            }
            metadata = content.get("metadata")  # some checkpoints have none, or null
            content["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
            write_text_atomic(new / INDEX_FILE, json.dumps(content, indent=2) + "\n")
        known = dict(finished.files)
        finished.close(new)
        digest = self.checkpoint.sha256(lambda file: known.get(file.name) or sha256_file(file)) if hashed else None
        unchanged.check()
        return digest


def _raise_first(futures: Sequence[Future[None]]) -> None:
    """Wait for all; raise what the first of them has raised that was not merely stopped."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, CancelledError)):
        raise error


def _fits_memory(size: int) -> bool:
    return size < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_fit(checkpoint: Checkpoint, weights: WeightMap, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Refuse adapters that do not belong to this base, and bases that no delta can be added to."""
    problems: list[SokaError] = []
    for adapter, weight in adapters:
        if not math.isfinite(weight):
            problems.append(CheckpointError(f"{adapter.directory}: weight {weight} is not a finite number"))
        try:
            check_against(adapter, weights)
        except CheckpointError as error:
            problems.append(error)
        for module in adapter.factors:
            if module.rpartition(".")[2] == "lm_head" and ties_embeddings(checkpoint.config):
                tied = f"{adapter.directory}: {module} is tied to the embedding in this base: a merge would change both"
                problems.append(CheckpointError(tied))
    if problems:
        message, hint = joined(problems)
        raise CheckpointError(message, hint=hint)


def _check_base_hash(checkpoint: Checkpoint, expected: Mapping[Path, str], actual: str) -> None:
    wrong = [d for d, sha in expected.items() if sha != actual]
    if wrong:
        raise CheckpointError(
            "\n".join(
                f"{d}: made for base weights with sha256 {expected[d][:12]}..., "
                f"{checkpoint.directory} has {actual[:12]}..."
                for d in wrong
            ),
            hint="give the adapter's own base, or --allow-other-base if the difference is intended",
        )


def _no_logits(verify: Verify, layout: _Layout, chosen: Sequence[tuple[Path, float]]) -> str | None:
    """Why the logits are not compared, or None if they are.

    Raises:
        CheckpointError: they were asked for, and the base could only be opened by code of its own.
    """
    if verify == "tensors":
        return "verify = 'tensors'"
    if len(chosen) > 1 or chosen[0][1] != 1.0:
        return "several or weighted adapters: PEFT has no such sum"
    if not any("CausalLM" in str(a) for a in layout.checkpoint.config.get("architectures") or ()):
        return "the base is not a causal language model"
    if (problem := index_problem(layout.checkpoint.directory)) is not None:
        return problem
    try:
        check_no_code(layout.checkpoint.directory)
    except CheckpointError as error:
        if verify == "logits":
            raise
        return error.message
    if verify != "logits" and layout.total_bytes >= _LOGITS_LIMIT_BYTES:
        return f"{layout.total_bytes:,} bytes are too many for verify = 'auto'; 'logits' does it nevertheless"
    return None
