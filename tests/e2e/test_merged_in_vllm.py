"""A merged model is an ordinary model: vLLM (its CPU build here) serves it without any plugin."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import soka_serve
from soka_serve.builtin import base_directory
from soka_serve.builtin.tasks import generate
from tests.support import preloaded
from tests.support.builds import write_manifest
from tests.support.serving import ONE_PROCESS

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
def test_vllm_serves_the_merged_model(tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (make venv installs it)")
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
