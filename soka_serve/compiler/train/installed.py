"""What a training needs installed, said before the first stage runs; needs no torch."""

from __future__ import annotations

from importlib.util import find_spec

from soka_serve.errors import BuildError
from soka_serve.manifest.optimisers import OPTIMISERS
from soka_serve.manifest.schema import Train


def check_installed(train: Train) -> None:
    """Refuse an optimiser or trackers whose packages are not installed.

    Raises:
        BuildError: names the package.
    """
    optimiser = OPTIMISERS[train.optimiser]
    if optimiser.package and find_spec(optimiser.package) is None:
        raise BuildError(
            f'train.optimiser = "{train.optimiser}" needs the package {optimiser.pip}, which is not installed',
            hint=f"pip install {optimiser.pip}, or take another optimiser",
        )
    for tracker in train.report_to:
        if find_spec(tracker) is None:
            raise BuildError(
                f"train.report_to names {tracker!r}, which is not installed",
                hint=f"pip install {tracker}, or take it out of report_to",
            )
