"""What a request for a model that does not exist is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from soka_serve.io.file_names import CONFIG_FILE
from soka_serve.io.names import MODEL_NAME_RULE
from soka_vllm.names import build_names, missing_model


@pytest.mark.parametrize(
    ("name", "adapters", "said"),
    [
        ("mth", ["code", "math"], "does not exist. Did you mean `math`? The base is tiny; adapters: code, math"),
        ("tiney", ["code"], "does not exist. Did you mean `tiny`? The base is tiny; adapters: code"),
        ("zzz", ["code"], "does not exist. The base is tiny; adapters: code"),
        ("zzz", [], "does not exist. The base is tiny; adapters: none"),
        (
            "..",
            ["a.."],
            f"does not exist ({MODEL_NAME_RULE}). The base is tiny; adapters: a..",
        ),  # no name: nothing is near it
    ],
)
def test_what_there_is_and_what_was_meant(name: str, adapters: list[str], said: str) -> None:
    assert missing_model(name, ["tiny"], adapters) == f"The model `{name}` {said}"


def test_a_long_list_and_a_long_name_are_cut() -> None:
    said = missing_model("x" * 10**6 + "\x1b", ["tiny"], [f"a{at:02}" for at in range(30)])
    assert said.endswith("a18, a19 and 10 more")
    assert "\x1b" not in said
    assert MODEL_NAME_RULE in said
    assert len(said) < 1000


def test_names_of_builds_are_those_that_may_be_asked_for(tmp_path: Path) -> None:
    builds = tmp_path / "builds"
    for place in ("b/adapter", "a", ".hidden", "empty/other"):
        (builds / place).mkdir(parents=True)
        if "empty" not in place:
            (builds / place / CONFIG_FILE).write_text("{}")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / CONFIG_FILE).write_text("{}")
    (builds / "leads_out").symlink_to(tmp_path / "outside")
    assert build_names(builds) == ["a", "b"]
    assert build_names(tmp_path / "gone") == []
