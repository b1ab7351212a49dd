"""The embedded base model and its tokenizer, as they ship."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from eval.tiny_base.tokenizer import BOS, EOS, MAX_POSITIONS, PAD, train_tokenizer
from eval.tiny_base.train import PROMPT_WEIGHT, learning_rate_at, main, make_batch, train, weighted_loss
from soka_serve.base.base import Base
from soka_serve.base.tokenizer import TextTokenizer
from soka_serve.builtin import base_directory
from soka_serve.builtin.tasks import EASY_FAMILIES, FAMILIES, TARGET_FAMILIES, draw_problems, generate
from soka_serve.compiler.answers import generate_answers, measure


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(base_directory() / "tokenizer.json"))


@pytest.fixture(scope="module")
def hf_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(base_directory()))


@pytest.fixture(scope="module")
def text_tokenizer() -> TextTokenizer:
    return Base(base_directory()).tokenizer


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(str(base_directory()))
    torch.set_num_threads(threads)


def test_the_checkpoint_fits_the_package() -> None:
    files = {path.name: path.stat().st_size for path in base_directory().iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(files) == expected | {"training.json"}
    assert sum(files.values()) <= 4 * 1024 * 1024


def test_the_architecture_is_llama_with_grouped_queries_and_heads_of_32() -> None:
    config = json.loads((base_directory() / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    # vLLM's CPU attention takes no smaller heads than 32.
    assert config["head_dim"] == 32
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["intermediate_size"] & (config["intermediate_size"] - 1), "the MLP shall not be a power of two"
    assert config["max_position_embeddings"] == MAX_POSITIONS >= 512


def test_the_weights_are_float32_and_finite(model: Any) -> None:
    with safe_open(base_directory() / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.float32, name
            assert torch.isfinite(tensor).all(), name
    assert 0.7e6 < sum(p.numel() for p in model.parameters()) < 1.1e6
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_transformers_and_tokenizers_give_the_same_ids(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    texts = [p.prompt + p.completion for family in FAMILIES for p in generate(family, "test", 20)]
    for text in [*texts, "", " ", "Janet’s ducks lay 16 eggs per day: 16 - 3 - 4 = <<16-3-4=9>>9", "数 5²\n\t"]:
        ids = tokenizer.encode(text).ids
        assert hf_tokenizer(text)["input_ids"] == ids
        assert ids[0] == tokenizer.token_to_id(BOS)
    assert (hf_tokenizer.bos_token, hf_tokenizer.eos_token, hf_tokenizer.pad_token) == (BOS, EOS, PAD)
    assert hf_tokenizer.vocab_size == tokenizer.get_vocab_size()


def test_special_tokens_agree_with_the_configs(tokenizer: Tokenizer) -> None:
    for file in ("config.json", "generation_config.json"):
        config = json.loads((base_directory() / file).read_text())
        assert config["bos_token_id"] == tokenizer.token_to_id(BOS)
        assert config["eos_token_id"] == tokenizer.token_to_id(EOS)
        assert config["pad_token_id"] == tokenizer.token_to_id(PAD)


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back_from_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids[1:], skip_special_tokens=False) == text


def test_every_digit_is_a_token(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("x = 4096 + 12", add_special_tokens=False).tokens
    assert "".join(tokens).replace("Ġ", " ") == "x = 4096 + 12"
    assert [token for token in tokens if token.isdigit()] == list("409612")
    assert not [token for token in tokenizer.get_vocab() if len(token) > 1 and any(map(str.isdigit, token))]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_completion_tokenize_apart_as_together(tokenizer: Tokenizer, family: str) -> None:
    for problem in generate(family, "test", 100):
        prompt = tokenizer.encode(problem.prompt).ids
        completion = tokenizer.encode(problem.completion, add_special_tokens=False).ids
        assert prompt + completion == tokenizer.encode(problem.prompt + problem.completion).ids
        assert len(prompt + completion) + 1 <= 96, "quickstart fine-tuning is quick because rows are short"


@pytest.mark.parametrize("family", TARGET_FAMILIES)
def test_target_text_has_no_token_that_the_base_never_saw(tokenizer: Tokenizer, family: str) -> None:
    seen: set[int] = set()
    for problem in islice(draw_problems(f"{family}-easy", "train"), 4000):
        seen.update(tokenizer.encode(problem.prompt + problem.completion).ids)
    wanted = {i for p in generate(family, "train", 1000) for i in tokenizer.encode(p.prompt + p.completion).ids}
    assert wanted <= seen


def test_the_tokenizer_can_be_made_again(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(seed=0).to_str() == tokenizer.to_str()


def test_the_chat_template_renders_a_question_of_the_math_family(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    problem = generate("math", "test", 1)[0]
    question = problem.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    user = {"role": "user", "content": question}
    ids = hf_tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode(problem.prompt).ids
    answered = [user, {"role": "assistant", "content": problem.completion.strip()}]
    text = hf_tokenizer.apply_chat_template(answered, tokenize=False)
    assert text == BOS + problem.prompt + problem.completion + EOS


def test_a_batch_puts_the_loss_on_completions(tokenizer: Tokenizer) -> None:
    ids, weights = make_batch([[("1 + 2 =", " 3\n"), ("4 - 2 =", " 2\n")], [("5 =", " 5")]], tokenizer)
    assert ids.shape == weights.shape
    assert tokenizer.decode(ids[0].tolist(), skip_special_tokens=False) == f"{BOS}1 + 2 = 3\n4 - 2 = 2\n{EOS}"
    learnt = [tokenizer.decode([i]) for i, w in zip(ids[0].tolist(), weights[0].tolist(), strict=True) if w == 1]
    assert learnt == [" ", "3", "\n", " ", "2", "\n", ""]
    padding = ids[1] == tokenizer.token_to_id(PAD)
    assert padding.any()
    assert (weights[1][padding] == 0).all()
    assert torch.isclose(weights, torch.tensor(PROMPT_WEIGHT)).any()


def test_padding_and_prompt_weights_do_what_they_say(model: Any, tokenizer: Tokenizer) -> None:
    long, short = [("1 + 2 =", " 3\n45 + 6 = 51")], [("1 + 2 =", " 3")]
    both, alone = make_batch([short, long], tokenizer), make_batch([short], tokenizer)
    only_short = both[1].clone()
    only_short[1] = 0
    with torch.no_grad():
        assert weighted_loss(model, both[0], only_short) == pytest.approx(weighted_loss(model, *alone).item(), rel=1e-4)


def test_the_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate_at(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == 0.01
    assert max(rates) == rates[100] == 1.0
    assert rates[-1] == pytest.approx(0.01, abs=1e-4)


def test_answers_do_not_depend_on_batching_and_keep_the_order(model: Any, text_tokenizer: TextTokenizer) -> None:
    prompts = [p.prompt for family in EASY_FAMILIES for p in generate(family, "test", 2)]
    alone = [generate_answers(model, text_tokenizer, [prompt], 12)[0] for prompt in prompts]
    assert len(set(alone)) > 1
    assert generate_answers(model, text_tokenizer, prompts, 12, batch_size=4) == alone
    assert generate_answers(model, text_tokenizer, [], 12) == []


def test_answering_leaves_the_model_in_its_mode(model: Any, text_tokenizer: TextTokenizer) -> None:
    model.train()
    assert measure(model, "math-easy", limit=2, max_new_tokens=2, tokenizer=text_tokenizer)[:2] == (0, 2)
    assert model.training
    model.eval()


def test_the_same_seed_trains_the_same_weights(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def first_steps(seed: int) -> torch.Tensor:
        model = train(tokenizer, steps=2, batch_size=2, peak=1e-3, seed=seed, out=tmp_path)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    weights = first_steps(3)
    assert torch.equal(first_steps(3), weights)
    assert not torch.equal(first_steps(4), weights)


@pytest.mark.slow
def test_the_script_writes_a_loadable_checkpoint_and_measures_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "base"
    threads = torch.get_num_threads()
    try:
        main(["--out", str(out), "--steps", "1", "--batch-size", "2", "--limit", "1"])
        record = json.loads((out / "training.json").read_text())
        capsys.readouterr()
        main(["--evaluate", str(out), "--limit", "1"])
    finally:
        torch.set_num_threads(threads)
    assert json.loads(capsys.readouterr().out) == record["accuracy"]
    assert set(record["accuracy"]) == set(FAMILIES)
    assert {path.name for path in out.iterdir()} == {path.name for path in base_directory().iterdir()}


def test_the_record_of_the_training_says_what_the_issue_asks() -> None:
    record = json.loads((base_directory() / "training.json").read_text())
    assert all(record["accuracy"][family] >= 0.95 for family in EASY_FAMILIES)
    assert all(record["accuracy"][family] <= 0.10 for family in TARGET_FAMILIES)
    assert record["test_problems_per_family"] >= 200


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_does_the_easy_tasks_and_fails_the_target_ones(
    model: Any, text_tokenizer: TextTokenizer, family: str
) -> None:
    result = measure(model, family, limit=60, max_new_tokens=48, tokenizer=text_tokenizer)
    assert result.total == 60
    accuracy = result.correct / result.total
    wrong = [sample for sample in result.samples if not sample.correct][:3]
    if family in EASY_FAMILIES:
        assert accuracy >= 0.95, wrong
    else:
        assert accuracy <= 0.10, result.samples[:3]
