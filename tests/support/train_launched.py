"""What `accelerate launch` runs in the tests: BASE WORK_DIR OPTIONS (JSON). Notes what each process writes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


def watch_sharding() -> set[str]:
    """Collects the types of the trained parameters as they are in a training step."""
    from soka_serve.compiler.train.trainer import SokaTrainer

    types: set[str] = set()
    original = SokaTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        types.update(type(p).__name__ for n, p in self.model.named_parameters() if "soka_" in n)
        return original(self, *args, **kwargs)

    SokaTrainer.training_step = training_step  # type: ignore[method-assign]
    return types


def fail_at(step: int) -> None:
    """Make the loss NaN at a step, in every process."""
    from soka_serve.compiler.train.trainer import Trainer

    original = Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step + 1 == step else loss

    Trainer.training_step = training_step


def shard_on_cpu() -> None:
    """Make accelerate shard on CPUs over gloo, which it only does on accelerators; torch's FSDP 2 itself can."""
    import torch.distributed
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def main() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    base, work_dir, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    from tests.support.training import make_examples, make_mixed_start, run_training

    written: set[str] = set()

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str) and str(work_dir) in args[0] and args[2] & os.O_WRONLY:
            written.add(Path(args[0]).name)

    save = torch.save

    def audited_save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(path, str | Path):
            written.add(Path(path).name)  # torch opens files in C++, where no audit event is raised
        save(value, path, *args, **kwargs)

    sharded = watch_sharding()
    sys.addaudithook(audit)
    torch.save = audited_save
    if "diverge_at" in options:
        fail_at(options.pop("diverge_at"))
    if options.pop("mixed", False):
        options |= make_mixed_start(base)
    if "eval_every" in options:
        options["eval_set"] = make_examples(8, seed=7)
    asked = 0
    if "accuracies" in options:
        accuracies = options.pop("accuracies")

        def accuracy(_: Any) -> float:
            nonlocal asked
            asked += 1
            return float(accuracies[asked - 1])

        options["accuracy"] = accuracy
    run_training(base, work_dir, **options)
    rank = int(os.environ.get("RANK", "0"))
    report = {"written": sorted(written), "sharded": sorted(sharded), "asked": asked}
    work_dir.with_name(f"{work_dir.name}-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
