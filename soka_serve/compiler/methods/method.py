"""What the rest of the compiler may ask of a training method, and the objects that it hands to one."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from soka_serve.io.file_names import CONFIG_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    import torch

    from soka_serve.base.base import Base
    from soka_serve.base.model import Dtype
    from soka_serve.base.modules import Module
    from soka_serve.kron import Factors
    from soka_serve.trained import Form

Trainable: TypeAlias = Any  # PeftModel | PreTrainedModel, of libraries without types
Terms: TypeAlias = Literal["all", "trained"] | float  # which are exported, see `adapter_terms` in [output]


@dataclass(frozen=True)
class StartingPoint:
    """What a method builds its trainable model from.

    Args:
        targets: full names of the modules to adapt.
        rank: rank of the adapter, for methods that are `ranked`.
        scale: alpha over the rank, for methods that are `scaled`.
        base_name: what adapter_config.json names as the base.
        device: where the model will be trained.
        steps: optimiser steps of the run; None where the manifest counts epochs.
        initial_dir: where a method that rewrites the base keeps its factors of step 0.
        batches: makes training batches on `device`, for methods that `reads_batches`.
        factors: theta at the start by module name, for SoKA.
        initial: the modules whose starting factors are subtracted (theta - theta0), for SoKA.
        cut: terms that are taken off modules' weights and stay off, by name, for SoKA.
        forms: what of a module is trained by its name, for SoKA; of others everything.
        quantize: the bits of the base that the adapter adds to, where it is right on that alone, for SoKA.
    """

    targets: Sequence[str]
    rank: int
    scale: float
    base_name: str
    device: torch.device
    steps: int | None
    initial_dir: Path
    batches: Callable[[], Sequence[Mapping[str, torch.Tensor]]]
    factors: Mapping[str, Factors]
    initial: Collection[str]
    cut: Mapping[str, Factors] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)
    quantize: str | None = None


@dataclass(frozen=True)
class DenseOutput:
    """How a dense model is written: into `out`, a directory to make, with `base_name` as what it calls its base.

    `dtype` is that of the weights; with "auto" each keeps the one that it has in the base.
    """

    base: Base
    out: Path
    dtype: Dtype
    base_name: str
    progress: bool


@dataclass(frozen=True)
class Method(ABC):
    """A training method.

    Args:
        name: what manifests and suites call it.
        label: what people call it.
        in_manifests: whether `[train] method` may name it.
    """

    name: str
    label: str
    in_manifests: bool = False

    ranked: ClassVar[bool] = True
    """It takes a rank of its own; SoKA reads the ranks of [[adapt]]."""
    scaled: ClassVar[bool] = False
    """Its update has a factor: `train.method_scale`."""
    kronecker: ClassVar[bool] = False
    """It trains Kronecker factors, which stage `init` finds by the rules of [[adapt]]."""
    whole_model: ClassVar[bool] = False
    """It trains the model's own parameters, so that there is no adapter."""
    reads_batches: ClassVar[bool] = False
    """It needs training batches to start."""
    keeps_base: ClassVar[bool] = True
    """The model with its adapter off is the base."""
    needs_plugin: ClassVar[bool] = False
    """vLLM serves its adapters through the plugin only."""

    @abstractmethod
    def parameters(self, module: Module, rank: int) -> int:
        """Trainable parameters on one module, as training begins."""

    def stored_parameters(self, trained: int) -> int:
        """Parameters of a finished adapter with so many trained ones."""
        return trained

    @abstractmethod
    def build(self, model: Any, start: StartingPoint) -> Trainable:
        """Put the trainable parameters on a base model.

        Raises:
            PlanError: the method does not fit the base, or there is no module to adapt.
        """

    @abstractmethod
    def restore(self, model: Any, start: StartingPoint, checkpoint: Path) -> Trainable:
        """The model as a checkpoint of the run left it. A `whole_model` was read from there already.

        Raises:
            CheckpointError: the checkpoint does not fit the base.
            BuildError: what the run started from cannot be worked out again.
        """

    def callbacks(self) -> list[Any]:
        """Callbacks that the Trainer needs."""
        return []

    @property
    def brings_optimizer(self) -> bool:
        """Whether it has an `optimizer` of its own, so that `train.optimiser` is not read."""
        return type(self).optimizer is not Method.optimizer

    def optimizer(self, model: Any, rate: float, weight_decay: float) -> torch.optim.Optimizer | None:
        """The optimiser of a method with rates of its own; None for the Trainer's."""
        return None

    def collect(self, checkpoint: Path, out: Path, *, initial_dir: Path, base_dir: Path) -> None:
        """Write the trained weights of a checkpoint into `out`, which exists, without what only resuming needs.

        Args:
            checkpoint: a checkpoint of the Trainer.
            out: directory of the trained adapter or model.
            initial_dir: the run's `StartingPoint.initial_dir`.
            base_dir: the base checkpoint.
        """
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copy2(checkpoint / name, out / name)

    @abstractmethod
    def export(self, trained: Path, out: Path, dtype: str, terms: Terms = "all") -> float:
        """Write the finished adapter into `out`, a directory to make.

        Args:
            trained: what `collect` wrote.
            out: directory of the adapter.
            dtype: of the tensors, for SoKA; the others stay in float32.
            terms: for SoKA, "all", or the best ones of each module: as many as were "trained", or as few as hold a
                share of the module's energy.

        Returns:
            The share of the delta's energy that was dropped.
        """

    @abstractmethod
    def merge(self, source: Path, merging: DenseOutput) -> None:
        """Write the dense model.

        Args:
            source: the finished adapter, or the trained model of a `whole_model`.
            merging: where and how.
        """
