"""Full fine-tuning: every parameter of the model in float32, embeddings and norms too, not only the target modules."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from soka_serve.compiler.methods.method import DenseOutput, Method, StartingPoint, Terms, Trainable

if TYPE_CHECKING:
    from soka_serve.base.modules import Module


@dataclass(frozen=True)
class Full(Method):
    """The model itself is trained, and stored whole."""

    ranked: ClassVar[bool] = False
    whole_model: ClassVar[bool] = True
    keeps_base: ClassVar[bool] = False

    def parameters(self, module: Module, rank: int) -> int:
        return module.out_features * module.in_features

    def build(self, model: Any, start: StartingPoint) -> Trainable:
        model.requires_grad_(True)
        return model

    def restore(self, model: Any, start: StartingPoint, checkpoint: Path) -> Trainable:
        return self.build(model, start)

    def collect(self, checkpoint: Path, out: Path, *, initial_dir: Path, base_dir: Path) -> None:
        for file in checkpoint.iterdir():
            if file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json"):
                shutil.copy2(file, out / file.name)
        config = json.loads((checkpoint / "config.json").read_text())
        original = json.loads((base_dir / "config.json").read_text())
        config["use_cache"] = original.get("use_cache", True)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def export(self, trained: Path, out: Path, dtype: str, terms: Terms = "all") -> float:
        raise NotImplementedError("full fine-tuning makes no adapter: merge() writes what it trained")

    def merge(self, source: Path, merging: DenseOutput) -> None:
        from soka_serve.base.model import load_base
        from soka_serve.compiler.methods.dense import write_dense

        write_dense(load_base(source, "float32"), merging)
