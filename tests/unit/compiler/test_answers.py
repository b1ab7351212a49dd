"""Answers of a model read as a server writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.decoders import DecodeStream

from soka_serve.base.base import Base
from soka_serve.compiler.answers import generate_answers
from tests.unit.base.test_tokenizer import BUILDERS, LLAMA_CLASS, save


class Echo:
    """A model that writes the same ids after every prompt."""

    training, device = False, "cpu"

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def eval(self) -> None: ...
    def train(self, _: bool) -> None: ...

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self.ends = options["eos_token_id"]
        return torch.cat([input_ids, torch.tensor([self.ids] * len(input_ids))], 1)


@pytest.mark.parametrize("kind", [*BUILDERS, "llama2 class"])
@pytest.mark.parametrize("completion", ["    return 3\n", "wer", "é 日", "\n"])
def test_answers_are_decoded_behind_their_prompts(tmp_path: Path, kind: str, completion: str) -> None:
    tokenizer = Base(save(BUILDERS[kind.split()[0]](), tmp_path, **LLAMA_CLASS if " " in kind else {})).tokenizer
    (pair,) = tokenizer.encode_pairs([("Ans", completion)])
    prompt, answer = pair.input_ids[: pair.prompt_length], pair.input_ids[pair.prompt_length :]
    stream = DecodeStream(ids=prompt, skip_special_tokens=True)  # as vLLM decodes
    served = "".join(stream.step(tokenizer.backend, number) or "" for number in answer)
    assert generate_answers(Echo([*answer, *answer]), tokenizer, ["Ans"]) == [served] == [completion]


def test_answers_end_at_every_id_that_ends_generation(tmp_path: Path) -> None:
    """LLaMA 3's generation config names several; a tokenizer may name none."""
    save(BUILDERS["llama3"](), tmp_path, eos_token=None)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    tokenizer = Base(tmp_path).tokenizer
    (answer,) = tokenizer.encode_texts([" 30"])
    for end in (1, 3):
        model = Echo([*answer, end, *answer])
        assert generate_answers(model, tokenizer, ["Answer:"]) == [" 30"]
        assert model.ends == [1, 3]
