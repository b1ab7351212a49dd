"""The model card: front matter that parses, code that compiles, text that cannot break out."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from soka_serve.builtin import base_directory
from soka_serve.compiler.report.card import extracted_card, render_card
from soka_serve.compiler.report.data import AnswerPair, ReportData
from tests.support.reports import report_data, spectra


@pytest.fixture
def data() -> ReportData:
    module = spectra(1)[5]
    sample = AnswerPair("What is 1 + 2?\n", "#### 3", "#### 4", "#### 3", False, True)
    return replace(
        report_data([module]),
        base_name="org/model-7b",
        history=[],
        samples=[sample],
        trainable_parameters=194,
        comparison={"LoRA r=2": 384, "a|b": 5},
        lock={"base": {"sha256": "ab" * 32}, "manifest": {"sha256": "cd" * 32, "file": "math.toml"}},
        artefacts={},
    )


def front_matter(card: str) -> dict[str, Any]:
    start, head, body = card.split("---\n", 2)
    assert start == ""
    assert body.startswith("\n# ")
    parsed = yaml.safe_load(head)
    assert isinstance(parsed, dict)
    return parsed


def python_block(card: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    compile(block, "card", "exec")
    return str(block)


def test_front_matter(data: ReportData) -> None:
    assert front_matter(render_card(data)) == {
        "base_model": "org/model-7b",
        "library_name": "peft",
        "tags": ["soka", "kronecker", "peft"],
    }


@pytest.mark.parametrize("name", ['a"b: [c]', "#x", "日本/モデル-🎉", "a\x7f\u2028\x85b", "yes", "{x}", "-"])
def test_front_matter_survives_any_base_name(data: ReportData, name: str) -> None:
    expected = "".join(c if c.isprintable() else " " for c in name)
    assert front_matter(render_card(replace(data, base_name=name)))["base_model"] == expected


def test_results_and_parameters(data: ReportData) -> None:
    card = render_card(data)
    assert "| base model alone | 4 of 200 | 2% | 1–5% |" in card
    assert "| this build | 186 of 200 | 93% | 89–96% |" in card
    assert "| trainable parameters | 194 |" in card
    assert "| for comparison, a\\|b on the same modules | 5 |" in card
    assert "| factors of a 64×32 weight | 8×4 and 8×8 |" in card
    assert f"| base sha256 | `{'ab' * 32}` |" in card


def test_accuracy_that_was_not_measured(data: ReportData) -> None:
    assert "Accuracy was not measured" in render_card(replace(data, accuracy_before=None, accuracy_after=(0, 0)))


def test_how_to_load(data: ReportData) -> None:
    code = python_block(render_card(data))
    assert "import soka_serve.peft" in code
    assert 'base = "org/model-7b"' in code
    assert "PeftModel.from_pretrained" in code


def test_the_embedded_base_is_found_through_the_package(data: ReportData) -> None:
    for name in ("builtin:tiny", str(base_directory())):
        card = render_card(replace(data, base_name=name))
        assert "base = base_directory()" in python_block(card)
        assert front_matter(card)["base_model"] == "builtin:tiny"


def test_local_paths_stay_private(data: ReportData) -> None:
    card = render_card(replace(data, base_name="/home/someone/models/base"))
    assert "/home/someone" not in card
    assert front_matter(card)["base_model"] == "base"
    assert 'base = "path/to/base"' in python_block(card)


@pytest.mark.parametrize("method", ["lora", "pissa", "lokr"])
def test_baselines_load_without_soka_serve(data: ReportData, method: str) -> None:
    card = render_card(replace(data, method=method, modules=[]))
    assert front_matter(card)["tags"] == [method, "peft"]
    assert "soka_serve.peft" not in python_block(card)
    assert ("plugin" in card) == (method == "lokr"), "vLLM itself knows LoRA and nothing else"


@pytest.mark.parametrize("method", ["soka", "lora"])
def test_a_merged_model_alone_is_no_adapter(data: ReportData, method: str) -> None:
    card = render_card(replace(data, method=method, artefacts={"merged": "merged"}))
    assert front_matter(card)["library_name"] == "transformers"
    assert "PeftModel" not in python_block(card)
    assert "lora-modules" not in card
    assert "merged into it" in card


def test_full_fine_tuning_is_a_model_not_an_adapter(data: ReportData) -> None:
    card = render_card(replace(data, method="full", modules=[]))
    assert front_matter(card)["library_name"] == "transformers"
    assert "PeftModel" not in python_block(card)


def test_model_output_stays_in_its_fence(data: ReportData) -> None:
    hostile = "```\n# Not a heading\n<script>alert(1)</script>\n````"
    card = render_card(replace(data, samples=[AnswerPair("Q", "A", "", hostile, None, None)], manifest_text=hostile))
    for language in ("text", "toml"):
        (inside,) = re.findall(rf"^`````{language}\n(.*?)\n`````$", card, flags=re.DOTALL | re.MULTILINE)
        assert hostile in inside


def test_no_line_of_the_card_is_left_over_from_the_template(data: ReportData) -> None:
    card = render_card(data)
    assert "{{" not in card
    assert "{%" not in card
    assert not re.search(r"\n{4,}", card)


def test_extracted_card() -> None:
    card = extracted_card("org/base", "/data/mine/tuned", 28, 123456, 0.912)
    assert front_matter(card)["base_model"] == "org/base"
    assert "/data/mine" not in card
    assert "`tuned`" in card
    assert "91.2%" in card
    assert "| parameters | 123,456 |" in card
    assert "import soka_serve.peft" in python_block(card)
