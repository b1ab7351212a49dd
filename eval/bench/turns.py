"""How long requests wait for their adapter's turn, past --max-loras, beside a client that never stops asking.

    python -m eval.bench.turns --out eval/results/turns.json

A real vLLM engine of the embedded base with the plugin, in this process: 64 adapters, 4 of them in a step. The greedy
client has three requests under way for each of adapters 0 to 3 at any time, of 16 to 48 tokens, so that they do not
all end in one step. Others ask for adapters 4 to 63, the k-th of them in proportion to 1/k, for 16 tokens, at random
moments, on average once in `--every` steps. First in vLLM's order, which is that of SOKA_TURN_SECONDS=0, then with
turns as by default.

The plugin's clock is the engine's steps, of which each counts as 10 ms: other load on the machine changes nothing. In
both runs the others ask for the same adapters at the same steps; what the greedy client asks for next depends on what
it got. "wait" is from the request to its first token, in such seconds, of the others'
requests; those that had none when the run ended count with what they had waited until then, as "never" says. "tokens"
are the whole server's, of finished requests.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from eval.llama import random_factors
from eval.record import make_parser, write_record
from soka_serve.adapter.format import write_adapter
from soka_serve.base.pretrained import open_model
from soka_serve.builtin import base_directory
from soka_vllm.settings import turn_seconds

ADAPTERS, SLOTS, PLACES = 64, 4, 32
GREEDY_EACH, GREEDY_TOKENS, OTHERS_TOKENS = 3, (16, 48), 16
STEP_S = 0.01
LAYERS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def percentile(values: list[float], share: float) -> float:
    """Of sorted values."""
    return round(values[min(len(values) - 1, int(share * len(values)))], 2)


class Run:
    """One run of the engine.

    Args:
        engine: vLLM's LLMEngine.
        folder: of the adapters, named by their numbers.
        every: steps between two of the others' requests, on average.
    """

    def __init__(self, engine: Any, folder: Path, every: float) -> None:
        self.engine, self.folder, self.every = engine, folder, every
        self.step = self.asked = self.tokens = 0
        self.draw, self.draw_greedy, self.draw_prompts = (random.Random(seed) for seed in range(3))
        self.began: dict[str, int] = {}  # the others' requests
        self.waits: list[float] = []
        self.admitted: set[str] = set()  # those of them that have a token
        self.greedy: dict[str, int] = {}  # the greedy client's requests under way: adapter
        ranks = range(1, ADAPTERS - SLOTS + 1)
        self.weights = list(accumulate(1 / k for k in ranks))

    def ask(self, adapter: int, tokens: int) -> str:
        """Send a request; returns its name."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        self.asked += 1
        name = f"{self.asked}"
        prompt = {"prompt_token_ids": [self.draw_prompts.randrange(3, 500) for _ in range(8)]}
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        lora = LoRARequest(f"a{adapter}", adapter + 1, str(self.folder / str(adapter)))
        self.engine.add_request(name, prompt, params, lora_request=lora)
        return name

    def run(self, steps: int) -> dict[str, Any]:
        """Both clients for so many steps."""
        next_other = 0.0
        for adapter in range(SLOTS):
            for _ in range(GREEDY_EACH):
                self._ask_greedily(adapter)
        for self.step in range(steps):
            while next_other <= self.step:
                adapter = SLOTS + self.draw.choices(range(ADAPTERS - SLOTS), cum_weights=self.weights)[0]
                self.began[self.ask(adapter, OTHERS_TOKENS)] = self.step
                next_other += self.draw.expovariate(1 / self.every)
            for output in self.engine.step():
                self._note(output)
        self.engine.abort_request([*self.began, *self.greedy, *self.admitted])
        while self.engine.has_unfinished_requests():
            self.engine.step()
        never = len(self.began)
        waits = sorted([*self.waits, *((steps - began) * STEP_S for began in self.began.values())])
        return {
            "others": len(waits),
            "never": never,
            "wait_s": {"p50": percentile(waits, 0.5), "p99": percentile(waits, 0.99), "max": percentile(waits, 1)},
            "tokens": self.tokens,
        }

    def _ask_greedily(self, adapter: int) -> None:
        self.greedy[self.ask(adapter, self.draw_greedy.randint(*GREEDY_TOKENS))] = adapter

    def _note(self, output: Any) -> None:
        name = output.request_id
        if name in self.began and output.outputs[0].token_ids:
            self.waits.append((self.step - self.began.pop(name)) * STEP_S)
            self.admitted.add(name)
        if output.finished:
            self.tokens += len(output.outputs[0].token_ids)
            self.admitted.discard(name)
            if name in self.greedy:
                self._ask_greedily(self.greedy.pop(name))


def make_engine(folder: Path) -> Any:
    """vLLM's LLMEngine with all adapters loaded."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(base_directory()),
        dtype="float32",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # the second run could use what the first has left
        max_model_len=64,
        max_num_seqs=PLACES,
        enable_lora=True,
        max_loras=SLOTS,
        max_cpu_loras=ADAPTERS,
        max_lora_rank=8,
        lora_target_modules=LAYERS,
        enforce_eager=True,
    )
    for i in range(ADAPTERS):
        llm.llm_engine.add_lora(LoRARequest(f"a{i}", i + 1, str(folder / str(i))))
    return llm.llm_engine


def run(engine: Any, folder: Path, seconds: float, options: Any) -> dict[str, Any]:
    """One run."""
    from soka_vllm import turns

    engine.engine_core.engine_core.scheduler._soka_turns = turns.Turns(seconds)
    one = Run(engine, folder, options.every)
    vars(turns)["time"] = SimpleNamespace(monotonic=lambda: one.step * STEP_S)
    started = time.process_time()
    found = one.run(options.steps)
    return {"turn_s": seconds, **found, "processor_s": round(time.process_time() - started, 1)}


def main() -> None:
    """Run, print and write."""
    parser = make_parser("eval.bench.turns", __doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--every", type=float, default=20.0, help="steps between two of the others' requests")
    options = parser.parse_args()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "soka",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    model = open_model(base_directory())
    weights = {n.removesuffix(".weight"): tuple(p.shape) for n, p in model.named_parameters() if "_proj" in n}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(ADAPTERS):
            torch.manual_seed(i)
            write_adapter(Path(folder) / f"{i}", random_factors(weights, 1), base_model="base")
        engine = make_engine(Path(folder))
        for name, seconds in (("vllm", 0.0), ("soka", turn_seconds())):
            results[name] = run(engine, Path(folder), seconds, options)
            print(name, results[name], flush=True)
    clients = {"adapters": ADAPTERS, "slots": SLOTS, "places": PLACES, "step_s": STEP_S}
    write_record(options, {**clients, "runs": results}, packages={"vllm": version("vllm-cpu")})


if __name__ == "__main__":
    main()
