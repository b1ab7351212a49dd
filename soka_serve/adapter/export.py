"""`soka-serve export`: write an adapter or a training checkpoint as SoKA or LoRA, and measure what is lost."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from soka_serve.adapter.format import KEY_PREFIX, Adapter, write_adapter
from soka_serve.adapter.loss import Energies, lost_energy, percent, shares, summary_lines
from soka_serve.adapter.remote.fetch import local_adapter
from soka_serve.adapter.source import AdapterSource, read_source
from soka_serve.errors import SokaError, printable, printable_lines
from soka_serve.io.file_names import ADAPTER_FILES, CARD_FILE, CONFIG_FILE, LOCK_FILE, WEIGHTS_FILE
from soka_serve.io.files import replace_directory, write_text_atomic
from soka_serve.io.lockfile import write_lock
from soka_serve.io.outputs import OutputKind
from soka_serve.io.places import given_path
from soka_serve.io.progress import track
from soka_serve.io.versions import versions
from soka_serve.io.warn_once import one_command
from soka_serve.kron import Factors, dense_delta, kpsvd, recompress
from soka_serve.kron.shapes import FactorShape

log = logging.getLogger(__name__)

Form = Literal["soka", "lora"]
EXPORTED = OutputKind(
    what="an exported adapter",
    is_marked=lambda lock: lock is not None and isinstance(lock.get("export"), Mapping),
    files=lambda *_: ADAPTER_FILES,
)


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote and what it dropped.

    `dropped_energy_frac` is the share of the deltas' squared Frobenius norm, over all modules, that the written
    adapter does not hold; `by_module` gives it per module. Both include what the dtype rounds away, and are 0 (to
    float32's rounding, about 1e-14) for an exact export. `ranks` are terms, or LoRA ranks.
    """

    out: Path
    form: Form
    modules: int
    parameters: int
    ranks: tuple[int, int]
    dropped_energy_frac: float
    by_module: dict[str, float] = field(repr=False)

    def to_text(self) -> str:
        """A few lines for people."""
        lines = [
            f"{'adapter' if self.form == 'soka' else 'LoRA':<11} {self.out}",
            *summary_lines(self.modules, self.ranks, self.parameters, self.dropped_energy_frac, self.by_module),
        ]
        return "\n".join(lines)


@one_command()
def export(
    source: str | Path,
    out: str | Path,
    *,
    to: Form = "soka",
    rank: int | Literal["trained"] | None = None,
    energy: float | None = None,
    dtype: str = "float32",
    progress: bool = False,
) -> ExportResult:
    """Write an adapter, or a training checkpoint, as a finished SoKA adapter or as a LoRA.

    "soka": trained minus initial terms, recompressed exactly (QR of the stacked factors and a small SVD; the dense
    delta is never built): nothing is lost unless `rank` or `energy` cuts terms or `dtype` rounds. "lora": the best
    rank-`rank` approximation of every delta. Kronecker terms have full matrix rank, so a LoRA of small rank loses much
    of them.

    Args:
        source: directory of a finished adapter or of a training checkpoint; as text also a hub id or URL.
        out: directory of the export; an earlier export in it is replaced as a whole, anything else refused.
        to: "soka" or "lora".
        rank: most terms per module, "trained" for as many as a training checkpoint trained, or the LoRA rank (then
            required; modules with fewer dimensions are padded).
        energy: for "soka", the share of each delta's energy that is kept, by as few terms as hold it; in (0, 1].
        dtype: of the written tensors.
        progress: show progress.

    Raises:
        CheckpointError: the source is damaged.
        SokaError: no rank for a LoRA, one below 1, or an energy that is no share or is given for a LoRA.
        BuildError: disk full and the like, or `out` holds something else.
    """
    _check_request(to, rank, energy)
    lora_rank = rank if isinstance(rank, int) else 1
    out, read_from, stored = given_path(out, "out"), local_adapter(source), getattr(torch, dtype)
    EXPORTED.check(out, keep=[read_from])
    read = read_source(read_from)
    adapter = read.adapter
    if to == "lora" and adapter.quantize is not None:
        raise SokaError(
            f"{read_from}: it adds to a base in {adapter.quantize}, which a LoRA cannot say of itself",
            hint="merge it: `soka-serve merge` adds it to the weights that this base computes with",
        )
    with replace_directory(out, foreign=EXPORTED.foreign) as new:
        with track(len(adapter.factors), f"export to {to}", unit="module", enabled=progress) as advance:
            if to == "soka":
                written, energies = _to_soka(adapter, rank, energy, stored, advance)
                ranks = [f.rank for f in written.values()]
                parameters = sum(f.parameters for f in written.values())
            else:
                tensors, energies = _to_lora(adapter, lora_rank, stored, advance)
                ranks, parameters = [lora_rank], sum(t.numel() for t in tensors.values())
        dropped, by_module = shares(energies)
        result = ExportResult(
            out=out,
            form=to,
            modules=len(energies),
            parameters=parameters,
            ranks=(min(ranks), max(ranks)),
            dropped_energy_frac=dropped,
            by_module=by_module,
        )
        lock = {**_source_lock(read), "export": _export_lock(read, result, dtype)}
        if to == "soka":
            write_adapter(new, written, base_model=adapter.base, dtype=stored, lock=lock)
        else:
            _write_lora(new, adapter, tensors, lora_rank)
            write_lock(new / LOCK_FILE, lock)
        write_text_atomic(new / CARD_FILE, _card(read, result))
    return result


def _check_request(to: str, rank: int | str | None, energy: float | None) -> None:
    if to not in ("soka", "lora"):
        raise SokaError(f"to: expected 'soka' or 'lora'; got {to!r}")
    if energy is not None and not 0 < energy <= 1:
        raise SokaError(f"energy: expected a share above 0, at most 1; got {energy!r}")
    if energy is not None and to == "lora":
        raise SokaError("energy chooses the terms of each module, and a LoRA has one rank", hint="give --rank instead")
    if to == "lora" and rank is None:
        raise SokaError("a LoRA needs a rank", hint="give --rank, such as 8; the energy it loses is then reported")
    if rank == "trained" and to == "soka":
        return
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise SokaError(f"rank: expected at least 1; got {rank!r}")


def _to_soka(
    adapter: Adapter, rank: int | Literal["trained"] | None, energy: float | None, dtype: torch.dtype, advance: Any
) -> tuple[dict[str, Factors], Energies]:
    written: dict[str, Factors] = {}
    energies: dict[str, tuple[float, float]] = {}
    for name, factors in adapter.factors.items():
        delta = adapter.delta_factors(name)
        kept, _ = recompress(delta, rank=factors.rank if rank == "trained" else rank, energy=energy)
        written[name] = kept.to(dtype)
        energies[name] = lost_energy(delta, written[name])
        advance(name)
    return written, energies


def _to_lora(adapter: Adapter, rank: int, dtype: torch.dtype, advance: Any) -> tuple[dict[str, Tensor], Energies]:
    """The truncated SVD of every delta as lora_A (rank, in) and lora_B (out, rank), scaling 1.

    An outer product is the Kronecker product of a column and a row, so the KPSVD of factor shape (out, 1, 1, in) is
    the SVD, exact or randomised as `kpsvd` chooses.
    """
    tensors: dict[str, Tensor] = {}
    energies: dict[str, tuple[float, float]] = {}
    for name in adapter.factors:
        delta = adapter.delta_factors(name)
        rows, columns = delta.shape.out_features, delta.shape.in_features
        dense = dense_delta(delta.to(torch.float64), torch.float32)
        found = kpsvd(dense, FactorShape(rows, 1, 1, columns), rank)
        root = found.factors.sigma.sqrt()
        a, b = torch.zeros(rank, columns), torch.zeros(rows, rank)
        a[: root.numel()] = found.factors.right[:, 0] * root[:, None]
        b[:, : root.numel()] = (found.factors.left[:, :, 0] * root[:, None]).t()
        a, b = a.to(dtype), b.to(dtype)
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = b
        lost = float((dense.sub_(b.float() @ a.float())).double().square().sum())
        energies[name] = (found.total_energy, min(lost, found.total_energy))
        advance(name)
    return tensors, energies


def _write_lora(new: Path, adapter: Adapter, tensors: Mapping[str, Tensor], rank: int) -> None:
    from peft import LoraConfig

    save_file(dict(sorted(tensors.items())), new / WEIGHTS_FILE, metadata={"format": "pt"})
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(adapter.factors),
        task_type="CAUSAL_LM",
        base_model_name_or_path=adapter.base_model,
        revision=adapter.config.get("revision"),
        inference_mode=True,
    )
    values = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    write_text_atomic(new / CONFIG_FILE, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _source_lock(source: AdapterSource) -> dict[str, Any]:
    """The source's soka.lock, or that of its build, without what describes the source's own files."""
    # What another file says about itself is not true of this one.
    lock = source.lock if source.lock is not None else {"soka": 1}
    return {key: value for key, value in lock.items() if key not in ("files", "adapter", "export")}


def _export_lock(source: AdapterSource, result: ExportResult, dtype: str) -> dict[str, Any]:
    return {
        "form": result.form,
        "dtype": dtype,
        "source_sha256": source.sha256,
        "source_is_checkpoint": bool(source.adapter.config["soka_initial"]),
        "dropped_energy_frac": result.dropped_energy_frac,
        "versions": versions(),
    }


def _card(source: AdapterSource, result: ExportResult) -> str:
    """The source's own card for an exact export; a short one that states the loss for anything else."""
    if result.form == "soka" and result.dropped_energy_frac < 1e-9 and source.card is not None:
        return printable_lines(source.card)
    base = printable(Path(source.adapter.base_model or "its base").name)
    method = "SoKA (Kronecker) adapter" if result.form == "soka" else f"LoRA of rank {result.ranks[1]}"
    use = (
        "Load with `import soka_serve.peft` and `PeftModel.from_pretrained`."
        if result.form == "soka"
        else "An ordinary LoRA: load it with PEFT, vLLM or any engine that knows LoRA."
    )
    lost = percent(result.dropped_energy_frac)
    return (
        f"---\nlibrary_name: peft\ntags: [{'soka' if result.form == 'soka' else 'lora'}]\n---\n\n"
        f"# {method} for {base}\n\n"
        f"{result.modules} modules, {result.parameters:,} parameters. Made by `soka-serve export` from a Kronecker "
        f"adapter; {lost} of the delta's energy (squared Frobenius norm) is lost.\n\n{use}\n"
    )
