"""The optimisers that `[train] optimiser` names: what each needs, and which trainings it is not for.

The names are the transformers Trainer's (`transformers.training_args.OptimizerNames`), but for "adamw". A further one
is a row here.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_OPTIMISER = "adamw"


@dataclass(frozen=True)
class Optimiser:
    """One optimiser.

    Args:
        trainer: what the Trainer calls it.
        package: what has to be importable.
        pip: what pip calls that.
        needs_gpu: on CPUs it fails, or is another optimiser.
        lawless: why SoKA's learning rates mean nothing with it; empty where a step moves each value by about its rate,
            whatever the gradient's size.
        projects: it projects the gradients of whole weight matrices, and nothing else has such.
        state: classes beside tensors that its state consists of, as module:class, which a resume point then holds.
        by_value: its state is one value per trained value, so that it can be cut with a dropped term.
        sharded: it steps parameters of which each process has a part (FSDP 2).
    """

    trainer: str
    package: str = ""
    pip: str = ""
    needs_gpu: bool = False
    lawless: str = ""
    projects: bool = False
    state: tuple[str, ...] = ()
    by_value: bool = False
    sharded: bool = False


def _bitsandbytes(*names: str, lawless: str = "", needs_gpu: bool = False) -> dict[str, Optimiser]:
    return {n: Optimiser(n, "bitsandbytes", "bitsandbytes", needs_gpu=needs_gpu, lawless=lawless) for n in names}


def _galore(*names: str, needs_gpu: bool = False) -> dict[str, Optimiser]:
    state = ("galore_torch.galore_projector:GaLoreProjector",)
    return {n: Optimiser(n, "galore_torch", "galore-torch", needs_gpu, projects=True, state=state) for n in names}


_APOLLO = ("apollo_torch.random_projector:GradientProjector",)


_BY_GRADIENT = "a step is the rate times the gradient, not about the rate"
_TOO_LARGE = "its first steps move values by ten times their rate"

OPTIMISERS: dict[str, Optimiser] = {
    DEFAULT_OPTIMISER: Optimiser("adamw_torch_fused", by_value=True, sharded=True),
    "adamw_torch": Optimiser("adamw_torch", by_value=True, sharded=True),
    "adamw_torch_fused": Optimiser("adamw_torch_fused", by_value=True, sharded=True),
    "adafactor": Optimiser("adafactor"),
    "adagrad": Optimiser("adagrad"),
    **_bitsandbytes("adamw_8bit", "adamw_bnb_8bit", "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit"),
    **_bitsandbytes("paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", needs_gpu=True),
    **_bitsandbytes("paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", needs_gpu=True),
    "adamw_torch_8bit": Optimiser("adamw_torch_8bit", "torchao", "torchao", sharded=True),
    "adamw_torch_4bit": Optimiser("adamw_torch_4bit", "torchao", "torchao", sharded=True),
    "stable_adamw": Optimiser("stable_adamw", "optimi", "torch-optimi", needs_gpu=True),
    **_galore("galore_adamw", "galore_adafactor"),
    **_galore("galore_adamw_8bit", needs_gpu=True),
    "apollo_adamw": Optimiser("apollo_adamw", "apollo_torch", "apollo-torch", projects=True, state=_APOLLO),
    "sgd": Optimiser("sgd", lawless=_BY_GRADIENT, sharded=True),
    "rmsprop": Optimiser("rmsprop", lawless=_TOO_LARGE, sharded=True),
    **_bitsandbytes("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", lawless=_TOO_LARGE),
}
"""By the name that the manifest says."""

_WITHIN = "it steps within the backward pass, before gradients can be scaled or clipped"
_AVERAGED = "the weights while it trains, which resume points and the last step hold, are not the ones that it means"
_UNTRIED = "it needs a device that this package has not been tried on"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("lomo", "adalomo"), _WITHIN),
    **dict.fromkeys(("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"), _WITHIN),
    "apollo_adamw_layerwise": _WITHIN,
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"), _AVERAGED),
    **dict.fromkeys(("adamw_torch_xla", "adamw_torch_npu_fused"), _UNTRIED),
    "adamw_anyprecision": "torchdistx, which it comes with, is not kept up",
    "grokadamw": "with its saved state an interrupted run does not go on as it would have",
}
"""The Trainer's others: why each is refused."""
