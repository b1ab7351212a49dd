"""Registration with PEFT, and the configuration."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

import soka_serve.peft
from soka_serve.errors import CheckpointError, PlanError, SokaError
from soka_serve.peft import SokaConfig, SokaModel
from soka_serve.peft.registration import add_peft_type, check_peft_version, register


def test_the_type_is_a_full_member_of_the_enum() -> None:
    member = PeftType("SOKA")
    assert member is PeftType["SOKA"] is PeftType.SOKA
    assert member in list(PeftType)
    assert (member.name, member.value, str.__str__(member)) == ("SOKA", "SOKA", "SOKA")
    assert member == "SOKA"
    assert json.dumps({"peft_type": member}) == '{"peft_type": "SOKA"}'
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert PeftType.LORA is not member
    assert len({m.value for m in PeftType}) == len(PeftType)


def test_registration_reaches_pefts_tables_and_can_be_repeated() -> None:
    count = len(PeftType)
    for _ in range(2):
        register(SokaConfig, SokaModel)
        assert add_peft_type() is PeftType("SOKA")
    assert len(PeftType) == count
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("SOKA")] is SokaConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType("SOKA")] is SokaModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType("SOKA")] == "soka_"


def test_another_package_with_the_same_type_is_an_error() -> None:
    with pytest.raises(SokaError, match=r"already registered, by soka_serve.peft.config.SokaConfig"):
        register(peft.LoraConfig, SokaModel)


@pytest.mark.parametrize("version", ["0.20.0", "0.22.0", "0.22.0.dev0", "1.0"])
def test_an_untried_peft_version_is_refused(version: str) -> None:
    with pytest.raises(SokaError, match=rf"needs peft >=0.21.0,<0.22; peft {version} is installed") as caught:
        check_peft_version(version)
    assert caught.value.hint is not None


def test_importing_with_an_untried_peft_says_so() -> None:
    program = (
        "import importlib.metadata as m\n"
        "real = m.version\n"
        "m.version = lambda name: '0.30.0' if name == 'peft' else real(name)\n"
        "import soka_serve.peft\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "SokaError: soka_serve.peft needs peft >=0.21.0,<0.22; peft 0.30.0 is installed" in result.stderr


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, not 0"),
        ({"r": True}, "r must be a whole number"),
        ({"shape": "auto"}, "shape must be 'balanced' or"),
        ({"shape": [4, 4, 4]}, "shape must be 'balanced' or"),
        ({"init_soka_weights": "gradient"}, "init_soka_weights must be 'weights', 'zero', 'random' or False"),
        ({"init_soka_weights": 0}, "init_soka_weights must be"),
        ({"init_soka_weights": "zero", "soka_initial": True}, "soka_initial does not go with"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform needs target_modules"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"soka_modules": {"a": {"rang": 1}}}, r"soka_modules\['a'\] takes rank, shape and trained only"),
        ({"soka_modules": {"a": 5}}, r"soka_modules\['a'\] takes rank, shape and trained only, got 5"),
        ({"soka_modules": {"a": None}}, r"soka_modules\['a'\] takes rank, shape and trained only, got None"),
        ({"soka_modules": {"a": "trained"}}, r"soka_modules\['a'\] takes rank, shape and trained only"),
        ({"soka_modules": {"a": {"rank": 0}}}, r"soka_modules\['a'\]: rank must be at least 1"),
        ({"soka_modules": {"a": {"shape": [1, 2]}}}, r"soka_modules\['a'\]: shape must be"),
    ],
)
def test_values_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SokaConfig(**fields)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(PlanError, match=r"r must be.*shape must be.*init_soka_weights must be"):
        SokaConfig(r=0, shape="auto", init_soka_weights="gradient")  # type: ignore[arg-type]


def test_bias_is_not_a_field() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'bias'"):
        SokaConfig(bias="all")  # type: ignore[call-arg]


def test_another_format_is_refused() -> None:
    with pytest.raises(CheckpointError, match="soka_format is 2; this version reads 1"):
        SokaConfig(soka_format=2)


def test_unknown_keys_in_the_file_are_named_and_left_out(tmp_path: Path) -> None:
    """As PEFT does: a newer PEFT writes keys that this one does not know."""
    SokaConfig(r=3, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "new_in_peft_0_22": None, "bias": "all"}))
    for read in (SokaConfig.from_pretrained, peft.PeftConfig.from_pretrained):
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['bias', 'new_in_peft_0_22'\]"):
            config = read(str(tmp_path))
        assert (config.r, config.target_modules) == (3, {"q_proj"})


@pytest.mark.parametrize("key", ["alpha", "lora_alpha", "soka_scale", "scaling"])
def test_unknown_keys_that_change_the_factors_meaning_are_refused(key: str, tmp_path: Path) -> None:
    SokaConfig(target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: 3}))
    with pytest.raises(CheckpointError, match=rf"unknown keys \['{key}'\]"):
        SokaConfig.from_pretrained(str(tmp_path))


def test_a_config_that_was_not_built_survives_the_disk(tmp_path: Path) -> None:
    config = SokaConfig(r=3, target_modules=["v_proj", "q_proj"], shape=[2, 2, 2, 2], seed=5, init_soka_weights="zero")
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    loaded = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, SokaConfig)
    assert loaded == config


def test_init_weights_means_initial_factors() -> None:
    assert SokaConfig(init_soka_weights="weights").soka_initial
    assert SokaConfig().init_soka_weights == "zero"
    assert not SokaConfig().soka_initial
    assert not SokaConfig(init_soka_weights=False).soka_initial


def test_what_the_package_exports_is_there() -> None:
    for name in soka_serve.peft.__all__:
        assert getattr(soka_serve.peft, name) is not None
