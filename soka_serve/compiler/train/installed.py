"""What a training needs of its packages and its launch, said before the first stage runs; needs no torch."""

from __future__ import annotations

from importlib.util import find_spec

from soka_serve.compiler.processes import launched_sharding
from soka_serve.errors import BuildError, PlanError
from soka_serve.manifest.optimisers import OPTIMISERS
from soka_serve.manifest.schema import Train


def check_installed(train: Train) -> None:
    """Refuse an optimiser or trackers whose packages are not installed, and an optimiser that the launch is not for.

    Raises:
        BuildError: names the package.
        PlanError: launched with FSDP 2, whose sharded parameters the optimiser cannot step.
    """
    optimiser = OPTIMISERS[train.optimiser]
    if not optimiser.sharded and launched_sharding() == "FSDP 2":
        able = ", ".join(f'"{name}"' for name, other in OPTIMISERS.items() if other.sharded and not other.lawless)
        raise PlanError(
            f'train.optimiser = "{train.optimiser}" does not go with FSDP 2, whose sharded parameters it cannot step',
            hint=f"take one of {able}, or launch without --use_fsdp (DDP)",
        )
    if optimiser.package and find_spec(optimiser.package) is None:
        raise package_missing("train.optimiser", train.optimiser)
    for tracker in train.report_to:
        if find_spec(tracker) is None:
            raise BuildError(
                f"train.report_to names {tracker!r}, which is not installed",
                hint=f"pip install {tracker}, or take it out of report_to",
            )


def package_missing(place: str, optimiser: str) -> BuildError:
    """What is said of an optimiser whose package is not installed.

    Args:
        place: of its name, as a user finds it.
        optimiser: its name.
    """
    pip = OPTIMISERS[optimiser].pip
    return BuildError(
        f'{place}: "{optimiser}" needs the package {pip}, which is not installed',
        hint=f"pip install {pip}, or take another optimiser",
    )
