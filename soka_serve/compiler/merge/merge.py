"""`soka-serve merge`: base + sum(weight * delta) as an ordinary dense model, streamed shard by shard."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from soka_serve.adapter.format import Adapter, check_against, unlike_bits
from soka_serve.adapter.source import read_source
from soka_serve.adapter.weighted import check_weight
from soka_serve.base.base import Base
from soka_serve.base.foreign_code import check_no_code
from soka_serve.base.optional_tensors import ties_embeddings
from soka_serve.base.resolve import open_base
from soka_serve.compiler.merge.layout import Dtype, MergeLayout, write_layout
from soka_serve.compiler.merge.papers import MERGED, copy_side_files, write_papers
from soka_serve.compiler.merge.resume import MergeJournal, merge_key
from soka_serve.compiler.merge.verify import verify_logits, verify_tensors
from soka_serve.errors import CheckpointError, joined
from soka_serve.io.files import replace_directory
from soka_serve.io.places import given_path
from soka_serve.io.warn_once import one_command

log = logging.getLogger(__name__)

Verify = bool | Literal["auto", "logits", "tensors"]

_LOGITS_LIMIT_BYTES = 2 << 30


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


@one_command()
def merge(
    adapters: str | Path | Sequence[tuple[Path, float]],
    *,
    base: str | Path,
    out: str | Path,
    revision: str | None = None,
    dtype: Dtype = "auto",
    verify: Verify = True,
    allow_other_base: bool = False,
    progress: bool = True,
) -> MergeResult:
    """Add adapters to a base's weights, shard by shard; write a dense model that any engine loads.

    Its eight parameters are the options of `soka-serve merge`; they travel on as a `MergeRun`.

    Args:
        adapters: one adapter directory, or several with weights: W + sum(weight * delta).
        base: directory, hub id, or 'tiny'.
        out: directory of the merged model; an earlier one in it is replaced as a whole, anything else refused.
        revision: of a hub base.
        dtype: of the merged weights; 'auto' keeps the base's.
        verify: reload the result and compare it with base + adapters; see `MergeRun`.
        allow_other_base: merge although the adapter's soka.lock names other base weights.
        progress: show progress.

    Raises:
        SokaError: anything the user can mend; `out` is left as it was.
    """
    target = given_path(out, "out")
    chosen = [(Path(adapters), 1.0)] if isinstance(adapters, str | Path) else list(adapters)
    MERGED.check(target, keep=[Path(base), *(path for path, _ in chosen)])  # before anything is fetched
    return MergeRun(chosen, open_base(str(base), revision), target, dtype, verify, allow_other_base, progress).run()


@dataclass(frozen=True)
class MergeRun:
    """One merge: W + sum(weight * delta) for every adapted weight, and every other tensor as it is.

    Where the adapters add to a base in bits (`soka_quantize`), W is what that base computes with.

    Semantics: merged[name] = W + sum over adapters of weight * delta, summed in float32 (float64 for a float32
    output) and rounded once to the output's dtype.

    The base is read in blocks of a few MiB; tensors that no adapter touches are copied byte for byte. The
    result has the base's shards, index, config, tokenizer and generation config, and loads in any engine. It replaces
    an earlier merged model in `out` as a whole; anything else there is refused before any work. Pickles, code and other
    files of the base stay behind. After a kill, finished files are taken over.

    Args:
        adapters: adapter directories with weights. Training checkpoints count with trained - initial.
        base: their base.
        out: directory of the merged model.
        dtype: of all floating tensors; "auto" keeps each one's own.
        verify: "tensors" recomputes a sample in float64; "logits" does that, reloads the model with transformers and
            compares it with base + adapter through PEFT; "auto" (or True) takes "logits" below 2 GiB; False: nothing.
        allow_other_base: merge although an adapter's soka.lock names other base weights.
        progress: show progress.
    """

    adapters: Sequence[tuple[Path, float]]
    base: Base
    out: Path
    dtype: Dtype = "auto"
    verify: Verify = "auto"
    allow_other_base: bool = False
    progress: bool = True

    def run(self) -> MergeResult:
        """Write the merged model.

        Raises:
            CheckpointError: base or adapter are damaged or do not fit each other, or a sum overflows the dtype.
            BuildError: the disk is full and the like, or the verification failed; `out` is then as it was.
        """
        started = time.monotonic()
        if not self.adapters:
            raise CheckpointError("no adapter to merge", hint="give at least one adapter directory")
        MERGED.check(self.out, keep=[self.base.directory, *(path for path, _ in self.adapters)])
        self.base.check_plain()
        sources = [(read_source(path), weight) for path, weight in self.adapters]
        adapters = [(source.adapter, weight) for source, weight in sources]
        _check_fit(self.base, adapters)
        layout = MergeLayout(self.base, adapters, self.dtype)
        layout.check_space(self.out)
        if layout.held:
            bits = adapters[0][0].quantize
            log.info("the adapter adds to its base in %s: %d weights are rounded to that first", bits, len(layout.held))
        reason = self._no_logits(layout)
        expected = {s.adapter.directory: sha for s, _ in sources if (sha := s.base_sha256) is not None}
        hashed = bool(expected) and not self.allow_other_base
        finished = MergeJournal(merge_key(self.base.checkpoint, sources, self.dtype, hashed=hashed))
        with replace_directory(self.out, foreign=MERGED.foreign, adopt=finished.adopt) as new:
            base_sha256 = write_layout(layout, new, finished, hashed=hashed, progress=self.progress)
            if base_sha256 is not None:
                _check_base_hash(self.base, expected, base_sha256)
            named = adapters[0][0].base_model
            copied = copy_side_files(self.base, new, self.dtype if layout.changes_dtype else None, named)
            log.debug("copied beside the weights: %s", ", ".join(copied))
            write_papers(new, self.base.directory, sources, self.dtype, base_sha256)
            ulp = nats = None
            if self.verify is not False:
                ulp = verify_tensors(new, self.base, adapters, layout.held)
                if reason is None:
                    nats = verify_logits(new, self.base.directory, adapters[0][0])
                else:
                    log.info("verify: logits are not compared (%s)", reason)
        return MergeResult(
            out=self.out,
            modules=len(layout.adapted),
            tensors=len(self.base.checkpoint.tensors),
            bytes_written=layout.total_bytes,
            dtype=self.dtype,
            seconds=time.monotonic() - started,
            verified=tuple(name for name, found in (("tensors", ulp), ("logits", nats)) if found is not None),
            max_error_ulp=ulp,
            logits_error=nats,
        )

    def _no_logits(self, layout: MergeLayout) -> str | None:
        """Why the logits are not compared, or None if they are.

        Raises:
            CheckpointError: they were asked for, and the base could only be opened by code of its own.
        """
        if self.verify in (False, "tensors"):
            return f"verify = {self.verify!r}"
        if len(self.adapters) > 1 or self.adapters[0][1] != 1.0:
            return "several or weighted adapters: PEFT has no such sum"
        if not any("CausalLM" in str(a) for a in self.base.config.get("architectures") or ()):
            return "the base is not a causal language model"
        if (problem := self.base.checkpoint.index_problem()) is not None:
            return problem
        try:
            check_no_code(self.base.folder)
        except CheckpointError as error:
            if self.verify == "logits":
                raise
            return error.message
        if self.verify != "logits" and layout.total_bytes >= _LOGITS_LIMIT_BYTES:
            return f"{layout.total_bytes:,} bytes are too many for verify = 'auto'; 'logits' does it nevertheless"
        return None


def _check_fit(base: Base, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Refuse adapters that do not belong to this base or to each other, and bases that no delta can be added to."""
    problems = unlike_bits([adapter for adapter, _ in adapters])
    for adapter, weight in adapters:
        for check in (partial(check_weight, adapter, weight), partial(check_against, adapter, base.weights)):
            try:
                check()
            except CheckpointError as error:
                problems.append(error)
        for module in adapter.factors:
            if module.rpartition(".")[2] == "lm_head" and ties_embeddings(base.config):
                tied = f"{adapter.directory}: {module} is tied to the embedding in this base: a merge would change both"
                problems.append(CheckpointError(tied))
    if problems:
        message, hint = joined(problems)
        raise CheckpointError(message, hint=hint)


def _check_base_hash(base: Base, expected: Mapping[Path, str], actual: str) -> None:
    wrong = [d for d, sha in expected.items() if sha != actual]
    if wrong:
        raise CheckpointError(
            "\n".join(
                f"{d}: made for base weights with sha256 {expected[d][:12]}..., {base.directory} has {actual[:12]}..."
                for d in wrong
            ),
            hint="give the adapter's own base, or --allow-other-base if the difference is intended",
        )
