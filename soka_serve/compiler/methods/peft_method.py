"""The methods that PEFT trains: an adapter from a PEFT config, stored as PEFT stores it."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soka_serve.compiler.methods.method import DenseOutput, Method, StartingPoint, Terms, Trainable
from soka_serve.errors import PlanError

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class PeftMethod(Method):
    """A method of PEFT; a subclass gives its config and counts its parameters."""

    @abstractmethod
    def config(self, start: StartingPoint) -> PeftConfig:
        """The PEFT config of an adapter."""

    def adapt(self, model: Any, config: PeftConfig, start: StartingPoint) -> Trainable:
        """Put the adapter on the base model."""
        from peft import get_peft_model

        return get_peft_model(model, config)

    def build(self, model: Any, start: StartingPoint) -> Trainable:
        if not start.targets:
            raise PlanError(f"train.method = {self.name!r}: no module to adapt")
        config = self.config(start)
        config.base_model_name_or_path = start.base_name
        return self.adapt(model, config, start)

    def restore(self, model: Any, start: StartingPoint, checkpoint: Path) -> Trainable:
        from soka_serve.compiler.methods.adapter_files import load_adapter_weights

        adapted = self.build(model, start)
        load_adapter_weights(adapted, checkpoint)
        return adapted

    def export(self, trained: Path, out: Path, dtype: str, terms: Terms = "all") -> float:
        shutil.copytree(trained, out)
        return 0.0

    def merge(self, source: Path, merging: DenseOutput) -> None:
        from soka_serve.base.model import load_base
        from soka_serve.compiler.methods.adapter_files import load_adapter
        from soka_serve.compiler.methods.dense import write_dense

        adapted = load_adapter(load_base(merging.base.directory, "float32"), source)
        write_dense(adapted.merge_and_unload(), merging)


def common_options(start: StartingPoint) -> dict[str, Any]:
    """The options that all configs share."""
    return {"target_modules": sorted(start.targets), "task_type": "CAUSAL_LM"}


def alpha(start: StartingPoint) -> float:
    """scale * rank; whole numbers as PEFT writes them."""
    found = start.scale * start.rank
    return int(found) if found.is_integer() else found
