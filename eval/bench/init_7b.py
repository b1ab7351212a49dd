"""Stage `init` from the weights, with activation weighting, over a whole model of LLaMA-2-7B's shapes: time and memory.

    python -m eval.bench.init_7b --train gsm8k_train.jsonl --out eval/results/init_7b.json

Generates the checkpoint in `--folder` where there is none, file by file (bf16; 13.5 GB at 32 layers; random weights,
whose spectrum is the flattest), with the embedded model's tokenizer, which uses the first rows of the embeddings only.
Without `--folder` it is removed at the end. Then, in a fresh process, reads a manifest with nothing in it but the base
and its dtype, `init = "weights"`, the data, `max_length` and `steps = 0`, and runs what `soka-serve build` runs up to
the stage's end: hashes of the base, examples as tokens, stage `init`. Nothing is taken from a cache. The dtype is that
of the manifests that ship for LLaMA-2-7B. That tokenizer's tokens are short: `--max-length 208` makes of 64 rows of
GSM8K about as many tokens as the tokenizers of real models do.

- `phases`: seconds on the wall and of the processor, of the stage. A phase that is inside of another one counts for
  itself alone. Files are mapped: the phase that first uses a weight waits for the disk. `decompositions` includes the
  products with the second moments, and writing candidates to the scratch folder.
- `peak_mb`: the most anonymous memory of the stage above what the process held before. Pages of the mapped checkpoint
  do not count; the system takes those back when it needs to.
"""

from __future__ import annotations

import functools
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from eval.bench.calibration import PROMPT
from eval.llama import write_model
from eval.measure import alone
from eval.memory import AnonymousPeak
from eval.record import make_parser, write_record
from soka_serve.base.tokenizer_class import TOKENIZER_FILES
from soka_serve.builtin import base_directory
from soka_serve.compiler.context import prepare
from soka_serve.compiler.init import initialise, placement, probe
from soka_serve.compiler.init.result import Initialisation
from soka_serve.compiler.init.walk import LayerWalk
from soka_serve.compiler.stages import encode, init_stage
from soka_serve.data.collate import IGNORED
from soka_serve.io.workspace import Workspace
from soka_serve.kron.weighting import InputMoments
from soka_serve.manifest.read import read_manifest

PHASES: list[tuple[Any, str, str]] = [
    (placement, "load_layered", "opening the base"),
    (placement.LayerPlacement, "_bring", "casting weights"),
    (LayerWalk, "__init__", "checking the walk"),
    (LayerWalk, "run", "forward pass"),
    (InputMoments, "accumulate", "second moments"),
    (InputMoments, "_add_waiting", "second moments"),
    (initialise, "read_matrix", "reading weights"),
    (initialise, "decompose", "decompositions"),
    (Initialisation, "write", "writing the result"),
]
"""Where a phase's work is done: owner, name of the function, phase."""

Seconds = dict[str, float]


class Phases:
    """Seconds of phases, each without those that run inside of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, Seconds] = {}
        self._inside: list[list[float]] = []  # of every running phase, the seconds of those inside

    def time(self, owner: Any, name: str, phase: str) -> None:
        """Have every call of a function of a module or class count for a phase, from now on."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            start = _clocks()
            self._inside.append([0.0, 0.0])
            try:
                return function(*arguments, **named)
            finally:
                taken = [now - then for now, then in zip(_clocks(), start, strict=True)]
                inside = self._inside.pop()
                total = self.seconds.setdefault(phase, {"wall_s": 0.0, "cpu_s": 0.0})
                for at, clock in enumerate(total):
                    total[clock] += taken[at] - inside[at]
                    if self._inside:
                        self._inside[-1][at] += taken[at]

        setattr(owner, name, timed)

    def found(self, whole: Seconds) -> dict[str, Seconds]:
        """The phases, longest first, and what is left of `whole`."""
        by_time = sorted(self.seconds.items(), key=lambda item: -item[1]["wall_s"])
        rest = {clock: whole[clock] - sum(s[clock] for s in self.seconds.values()) for clock in whole}
        return {phase: _rounded(seconds) for phase, seconds in [*by_time, ("rest", rest)]}


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _rounded(seconds: Seconds) -> Seconds:
    return {clock: round(value, 2) for clock, value in seconds.items()}


def timed(work: Callable[[], Any]) -> tuple[Any, Seconds]:
    """A call's result and its seconds."""
    start = _clocks()
    result = work()
    wall, cpu = (now - then for now, then in zip(_clocks(), start, strict=True))
    return result, {"wall_s": wall, "cpu_s": cpu}


def write_base(folder: Path, hidden: int, inner: int, layers: int, vocabulary: int) -> None:
    """A checkpoint with a tokenizer."""
    write_model(folder, hidden, inner, layers, kind="random", vocabulary=vocabulary, tied=False)
    for name in TOKENIZER_FILES:
        if (source := base_directory() / name).is_file():
            shutil.copyfile(source, folder / name)


def write_manifest(folder: Path, base: Path, dtype: str, train: Path, max_length: int) -> Path:
    """A start from the weights, and the default of everything else that a manifest need not say."""
    quote = json.dumps  # of a TOML string
    file = folder / "init-7b.toml"
    file.write_text(
        f"""schema = 1
[base]
path = {quote(str(base.resolve()))}
dtype = {quote(dtype)}
[[adapt]]
init = "weights"
[train]
steps = 0
max_length = {max_length}
[train.data]
jsonl = {quote(str(train.resolve()))}
prompt = {quote(PROMPT["prompt"])}
completion = {quote(PROMPT["completion"])}
"""
    )
    return file


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Everything up to the end of stage `init`, in a process of its own."""
    torch.set_num_threads(case["threads"])
    torch.linalg.svd(torch.randn(64, 64))  # libraries set up outside the measurement
    loaded = read_manifest(Path(case["manifest"]))
    workspace = Workspace(Path(case["folder"]) / "build", "init-7b")
    workspace.cache.mkdir(parents=True)
    context, hashing = timed(lambda: prepare(loaded, workspace, progress=case["progress"]))
    training, encoding = timed(lambda: encode(context)[0])
    phases, batches = Phases(), []
    for place in PHASES:
        phases.time(*place)
    gather, module = probe.gather, cast(Any, probe)

    def watched(model: Any, given: Any, *others: Any) -> Any:
        batches.extend(given)
        return gather(model, given, *others)

    module.gather = watched
    gc.collect()
    with AnonymousPeak() as peak:
        started, whole = timed(lambda: init_stage(context, training))
    return {
        "modules": len(started.modules),
        "ranks": sorted({m.rank for m in started.modules}),
        "rows": sum(len(b["labels"]) for b in batches),
        "tokens": sum(int(b["attention_mask"].sum()) for b in batches),
        "trained_tokens": sum(int((b["labels"] != IGNORED).sum()) for b in batches),
        "hash_s": _rounded(hashing),
        "encode_s": _rounded(encoding),
        "init_s": _rounded(whole),
        "phases": phases.found(whole),
        "peak_mb": round(peak.added_bytes / 1e6),
    }


def main() -> None:
    """Generate, measure and write the result."""
    parser = make_parser("eval.bench.init_7b", __doc__)
    parser.add_argument("--train", type=Path, required=True, help="JSON lines with `question` and `answer`")
    parser.add_argument("--folder", type=Path, help="folder of the checkpoint; made where it is missing, and kept")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size (default: LLaMA-2-7B's)")
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", default="bfloat16", help="the manifest's `base.dtype`")
    parser.add_argument("--max-length", type=int, default=208, help="tokens of the longest example")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base = options.folder or Path(name) / "base"
        if not base.exists():
            write_base(base, options.hidden, options.intermediate, options.layers, options.vocabulary)
        stored = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        manifest = write_manifest(Path(name), base, options.dtype, options.train, options.max_length)
        case = {"folder": name, "manifest": str(manifest), "threads": options.threads, "progress": True}
        found = {"checkpoint_gb": round(stored / 1e9, 2)} | alone(run, case)
    print(json.dumps(found, indent=1), flush=True)
    write_record(options, found)


if __name__ == "__main__":
    main()
