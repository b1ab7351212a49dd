"""A pytest plugin: PEFT's own tests, with SOKA among the methods, and nothing else run.

Wherever a test is parametrised over PEFT's configs, SOKA's cases are made from LoKr's, or where there are none from
LoRA's: the same model, targets and number of terms. Cases of a feature that is the other method's own (DoRA, Tucker
decompositions, convolutions) have no counterpart and are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoKrConfig, LoraConfig

from soka_serve.peft import SokaConfig

# A setting of the other method, and SOKA's of the same meaning; None is left out, because its value there means nothing
# here. Anything else that a case sets makes it that method's own.
SETTINGS: dict[str, str | None] = {
    "task_type": "task_type",
    "target_modules": "target_modules",
    "modules_to_save": "modules_to_save",
    "exclude_modules": "exclude_modules",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "rank_pattern": "rank_pattern",
    "r": "r",
    "lora_dropout": "soka_dropout",
    "alpha": None,
    "lora_alpha": None,
    "fan_in_fan_out": None,
}
# Tests whose cases have SOKA's default start alone, and why; all others run from the weights too.
FROZEN = "a start from the weights keeps its first factors, frozen, among the adapter's parameters"
DEFAULT_START_ALONE = {
    "low_cpu_mem_usage": "a start from the weights decomposes them, which needs memory for the factors",
    "requires_grad_set_correctly": FROZEN,
    "layer_indexing": FROZEN,
    "gradient_checkpointing": FROZEN,
    "test_training": FROZEN,
    "test_parameters_after_loading_model": "three steps of SGD at learning rate 0.5 overflow from the weights",
}
# "1": SOKA takes LoKr's place in all tests of the files that are run, instead of being a case more.
IN_PLACE_OF_LOKR = os.environ.get("SOKA_SUITE_IN_PLACE_OF_LOKR") == "1"
NO_LINEAR = ("conv", "emb", "mha")  # parts of target names in PEFT's small models


def translate(settings: dict[str, Any]) -> dict[str, Any] | None:
    """SOKA's settings for another method's; None where it has no counterpart."""
    made: dict[str, Any] = {}
    for name, value in settings.items():
        if name == "bias" and value == "none":
            continue
        if name not in SETTINGS:
            return None
        if (own := SETTINGS[name]) is not None:
            made[own] = value
    targets = made.get("target_modules") or ()
    if any(part in str(target).lower() for target in targets for part in NO_LINEAR):
        return None
    return made


def mirrored(case: Any, source: type) -> Any:
    """A case with SOKA in place of `source`; None where there is no counterpart, `source` is not in it."""
    values = case if isinstance(case, tuple | list) else [case]
    if source not in values:
        return None
    made: list[Any] = []
    for value in values:
        if value is source:
            made.append(SokaConfig)
        elif isinstance(value, dict):
            translated = translate(value)
            if translated is None:
                return None
            made.append(translated)
        elif isinstance(value, str):
            for name in ("LoKr", "LoRA", "LOKR", "LORA", "lokr", "lora"):
                value = value.replace(name, "soka" if name.islower() else "SOKA")
            made.append(value)
        else:
            made.append(value)
    return tuple(made) if isinstance(case, tuple | list) else made[0]


def soka_cases(cases: list[Any]) -> Iterator[Any]:
    """SOKA's cases for one list of another methods' cases."""
    plain = [case.values if type(case).__name__ == "ParameterSet" else case for case in cases]
    plain = [case[0] if isinstance(case, tuple) and len(case) == 1 else case for case in plain]
    for source in (LoKrConfig, LoraConfig):
        found = [made for case in plain if (made := mirrored(case, source)) is not None]
        if found:
            seen = []
            for made in found:
                if repr(made) not in seen:
                    seen.append(repr(made))
                    yield made
            return


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put SOKA's cases in place of the others, in the marks that pytest reads next."""
    if IN_PLACE_OF_LOKR:
        return
    for node in metafunc.definition.listchain():
        for place, mark in enumerate(node.own_markers):
            if mark.name != "parametrize" or len(mark.args) < 2:
                continue
            cases = list(soka_cases(list(mark.args[1])))
            if not any(name in metafunc.definition.name for name in DEFAULT_START_ALONE):
                cases += [_from_weights(case) for case in cases]
            if cases:
                options = {name: value for name, value in mark.kwargs.items() if name != "ids"}
                node.own_markers[place] = pytest.mark.parametrize(mark.args[0], cases, **options).mark


def _from_weights(case: Any) -> Any:
    """The same case from another start; a class alone becomes one that has it as its default."""
    if isinstance(case, tuple):
        if any(isinstance(value, dict) for value in case):
            return tuple({**v, "init_soka_weights": "weights"} if isinstance(v, dict) else v for v in case)
        return tuple(_from_weights(value) if value is SokaConfig else value for value in case)
    return WeightsConfig if case is SokaConfig else case


class WeightsConfig(SokaConfig):
    """SOKA's config, starting from the weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"init_soka_weights": "weights", **kwargs})


class LokrSubstituteConfig(SokaConfig):
    """SOKA's config, made from the arguments of LoKr's, for tests that name LoKr and take no cases."""

    def __init__(self, *, init_weights: bool = True, **settings: Any) -> None:
        start: Any = "weights" if init_weights else "random"
        super().__init__(init_soka_weights=start, **(translate(settings) or {}))


def _has_soka(value: Any) -> bool:
    return value in (SokaConfig, WeightsConfig) or (isinstance(value, tuple | list) and any(map(_has_soka, value)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that have no case of SOKA's."""
    if IN_PLACE_OF_LOKR:
        return
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        (kept if any(map(_has_soka, params.values())) else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """PEFT's tests skip a method that is not on their lists; SOKA stands in the place of one that is."""
    from tests import testing_common  # type: ignore[attr-defined]  # of PEFT

    modules = [testing_common, getattr(item, "module", testing_common)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing_common, "LoKrConfig", SokaConfig)  # has transformers' Conv1D
        if "mixed_adapter_batches" in item.name:
            for module in modules:
                patch.setattr(module, "LoraConfig", SokaConfig, raising=False)
        yield


def pytest_configure(config: pytest.Config) -> None:
    if IN_PLACE_OF_LOKR:
        peft.LoKrConfig = LokrSubstituteConfig
    torch.set_num_threads(int(os.environ.get("SOKA_SUITE_THREADS", "1")))
    stand_ins = os.environ.get("SOKA_SUITE_STAND_INS")
    if stand_ins:  # hub ids are paths relative to this folder
        os.chdir(Path(stand_ins))


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> None:
    """PEFT's helper that makes a method start with an effect knows PEFT's methods only."""
    from tests import testing_utils  # type: ignore[attr-defined]  # of PEFT

    plain = testing_utils.set_init_weights_false
    if getattr(plain, "_knows_soka", False):
        return

    def set_init_weights_false(config_cls: type, kwargs: dict[str, Any]) -> dict[str, Any]:
        if issubclass(config_cls, SokaConfig):
            return {**kwargs, "init_soka_weights": "random"}
        changed: dict[str, Any] = plain(config_cls, kwargs)
        return changed

    set_init_weights_false._knows_soka = True  # type: ignore[attr-defined]
    testing_utils.set_init_weights_false = set_init_weights_false
