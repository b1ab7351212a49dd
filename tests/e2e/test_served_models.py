"""What vLLM serves, against transformers: other architectures than LLaMA with our PEFT layers, and merged models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import soka_serve
from soka_serve.builtin import base_directory
from soka_serve.builtin.tasks import generate
from tests.conftest import NEEDS_VLLM
from tests.support import preloaded
from tests.support.builds import write_manifest
from tests.support.served_models import (
    ARCHITECTURES,
    FUSED,
    MULTIMODAL,
    Architecture,
    difference,
    expected,
    served,
    write_checkpoint,
    write_random_adapter,
)
from tests.support.serving import ONE_PROCESS

CHOSEN = [*(a for a in ARCHITECTURES if a.name in ("Gemma 2", "Qwen3")), FUSED, MULTIMODAL]
MORE = {"Qwen3", MULTIMODAL.name}


@pytest.mark.slow
@NEEDS_VLLM
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, id=a.name, marks=[pytest.mark.slow_matrix] if a.name in MORE else []) for a in CHOSEN],
)
def test_served_as_transformers_computes_it(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if architecture is MULTIMODAL:
        pytest.importorskip("torchvision", reason="vLLM's multimodal models need torchvision, here its CPU build")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in ONE_PROCESS.items():
        monkeypatch.setenv(name, value)
    base = write_checkpoint(tmp_path / "base", architecture)
    adapter = write_random_adapter(tmp_path / "adapter", base)
    plain, adapted = expected(base, adapter, architecture)
    assert difference(plain, adapted) > 0.5
    with served(base, adapter, tmp_path / "vllm.log", architecture.options) as ask:
        assert difference(ask("base"), plain) < 2e-5
        assert difference(ask("adapter"), adapted) < 2e-5


# --- a merged model is an ordinary model ------------------------------------------------------------------------------


ASK = """
import json, sys
from vllm import LLM, SamplingParams

model = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4)
sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=1, ignore_eos=True)
replies = model.generate(json.loads(sys.argv[2]), sampling)
answers = []
for reply in replies:
    out = reply.outputs[0]
    answers.append({
        "prompt": list(reply.prompt_token_ids),
        "tokens": list(out.token_ids),
        "logprobs": [step[token].logprob for step, token in zip(out.logprobs, out.token_ids)],
    })
print("ANSWERS", json.dumps(answers))
"""


@pytest.mark.slow
@NEEDS_VLLM
def test_vllm_serves_the_merged_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    built = soka_serve.build(write_manifest(tmp_path, steps=10), out=tmp_path / "build", progress=False)
    assert built.merged is not None
    prompts = [problem.prompt for problem in generate("math", "test", 4)]
    environment = {**ONE_PROCESS, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment["VLLM_LOGGING_LEVEL"] = "ERROR"
    command = [preloaded.CODE, ASK, built.merged, json.dumps(prompts)]
    done = preloaded.run("vllm", command, cwd=tmp_path, env=environment, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    answers = json.loads(lines[0].removeprefix("ANSWERS "))
    merged = AutoModelForCausalLM.from_pretrained(built.merged)
    base = AutoModelForCausalLM.from_pretrained(base_directory())
    effect = 0.0
    for answer in answers:
        tokens = torch.tensor([answer["prompt"] + answer["tokens"]])
        start = len(answer["prompt"]) - 1
        with torch.no_grad():
            ours = torch.log_softmax(merged(tokens).logits[0].double(), -1)[start:-1]
            plain = torch.log_softmax(base(tokens).logits[0].double(), -1)[start:-1]
        assert ours.argmax(-1).tolist() == answer["tokens"]
        chosen = torch.tensor(answer["tokens"])[:, None]
        got = torch.tensor(answer["logprobs"], dtype=torch.float64)
        # vLLM's attention sums in another order: 1e-4 nats is what the independent server check allows in float32.
        torch.testing.assert_close(got, ours.gather(1, chosen)[:, 0], rtol=0, atol=1e-4)
        effect = max(effect, float((plain.gather(1, chosen)[:, 0] - got).abs().max()))
    assert effect > 1e-3
