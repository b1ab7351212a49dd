"""Sums of adapters on one real server over HTTP: `"model": "math+0.5*code"`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from soka_serve.builtin import base_directory
from tests.support import preloaded
from tests.support.serve_adapters import (
    ALPHA,
    BETA,
    LORA,
    PROMPTS,
    TARGET_OPTIONS,
    AdapterServer,
    summed,
    write_peft,
    write_soka,
)
from tests.support.serving import ONE_PROCESS, Server, base_model, random_factors, serve

pytestmark = pytest.mark.slow

KEPT = 4


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterServer]:
    folder = tmp_path_factory.mktemp("serve")
    builds = folder / "builds"
    references = {
        "base": base_model(),
        "math": write_soka(folder / "math", random_factors(ALPHA, 1, seed=1, scale=0.02)),
        "code": write_soka(folder / "code", random_factors(ALPHA, 2, seed=2, scale=0.02)),
        "other": write_soka(folder / "other", random_factors(BETA, 2, seed=3, scale=0.02)),
        "lora": write_peft(folder / "lora", LORA, seed=4),
        "c++": write_peft(folder / "cpp", LORA, seed=5),
        "built": write_soka(builds / "built" / "adapter", random_factors(ALPHA, 1, seed=6, scale=0.02)),
    }
    modules = {"math": "math", "code": "code", "other": "other", "lora": "lora", "c++": "cpp"}
    options = [*TARGET_OPTIONS, "--max-loras", "2", "--max-cpu-loras", "3", "--max-lora-rank", "8"]
    options += ["--lora-modules", *(f"{name}={folder / place}" for name, place in modules.items())]
    more = {"SOKA_SUMS": str(KEPT), "SOKA_BUILDS": str(builds)}
    with serve(folder, options, more=more) as server:
        yield AdapterServer(server, references, folder)


def ask_as(served: AdapterServer, text: str, *terms: tuple[float, str]) -> None:
    """Hold the answers to a sum against the dense sum, and against each of its members, which answer otherwise."""
    served.references[text] = summed(served.references, *terms)
    for prompt in PROMPTS[:2]:
        served.check_alone(text, prompt)
        tokens, logprobs = served.server.ask(text, prompt)
        for _, member in terms:
            other, others = served.server.ask(member, prompt)
            assert other != tokens or max(abs(a - b) for a, b in zip(logprobs, others, strict=True)) > 0.01, member


def test_kronecker_adapters(served: AdapterServer) -> None:
    ask_as(served, "math+0.5*code", (1, "math"), (0.5, "code"))
    ask_as(served, "0.25*math", (0.25, "math"))


def test_lora_adapters_and_a_name_with_a_plus(served: AdapterServer) -> None:
    ask_as(served, "0.5*c+++0.75*lora", (0.5, "c++"), (0.75, "lora"))
    served.check_alone("c++", PROMPTS[0])


def test_kinds_that_share_layers(served: AdapterServer) -> None:
    """Each layer of the sum holds Kronecker factors and LoRA's matrices, in a slot that others use before and after."""
    for _ in range(2):
        ask_as(served, "math + -0.5*lora", (1, "math"), (-0.5, "lora"))
        ask_as(served, "other+0.5*lora", (1, "other"), (0.5, "lora"))
        for name in ("code", "lora", "base", "other"):
            served.check_alone(name, PROMPTS[0])


def test_in_one_batch_with_others(served: AdapterServer) -> None:
    names = {
        "math+0.5*code": [(1.0, "math"), (0.5, "code")],
        "lora+math": [(1.0, "lora"), (1.0, "math")],
        "built+code": [(1.0, "built"), (1.0, "code")],  # a member that is loaded by its name
    }
    for text, terms in names.items():
        served.references[text] = summed(served.references, *terms)
    served.check_at_once([*names, "base", "math", "lora"])


def test_one_sum_however_it_is_written(served: AdapterServer) -> None:
    message = [{"role": "user", "content": "x"}]
    before = served.server.metric("soka:adapter_load_seconds_count", outcome="loaded")
    spellings = ["code+3*math", " 3 * math + code ", "code+3.0*math", "math+2*math+1e0*code", "code+3e0*math"]
    answers = []
    for text in spellings:
        status, reply = served.server.post("/v1/completions", {"model": text, "prompt": [1, 2], "max_tokens": 3})
        assert status == 200, (text, reply)
        answers.append(reply["model"])
        status, reply = served.server.post(
            "/v1/chat/completions", {"model": text, "messages": message, "max_tokens": 1}
        )
        assert status == 200, (text, reply)
        status, reply = served.server.post("/tokenize", {"model": text, "prompt": "x"})
        assert status == 200, (text, reply)
    assert set(answers) == {"code+3*math"}
    assert served.server.metric("soka:adapter_load_seconds_count", outcome="loaded") == before + 1
    assert served.server.metric("soka:requests_total", adapter="code+3*math") == 2 * len(spellings)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("mth+0.5*code", 404, "The model `mth+0.5*code` does not exist: no adapter `mth`. Did you mean `math`?"),
        ("math+", 404, "a part of the sum has no name"),
        ("nan*math", 400, "the scale nan of `math` is no finite number"),
        ("math+1e999*code", 400, "the scale 1e999 of `code` is no finite number"),
        ("math+1e300*code", 400, "scaled values are not finite in torch.float32; give smaller scales"),
        ("x*math", 400, "the scale `x` of `math` is not a number"),
        ("math-0.5*code", 400, "a negative scale is written `math+-0.5*code`"),
        ("math*0.5", 400, "the scale comes first: `0.5*math`"),
        ("math+-1*math", 400, "ask for the base by its name"),
        ("base+math", 400, "`base` is the base, which is in every sum; leave it out"),
        ("math+other", 400, "differ, and terms of different shapes do not concatenate"),
        ("lora+c+++2*lora", 200, ""),  # of rank 8
        ("+".join(["math"] * 17), 400, "at most 16 terms"),
    ],
)
def test_what_is_refused(served: AdapterServer, text: str, code: int, said: str) -> None:
    status, reply = served.server.post("/v1/completions", {"model": text, "prompt": [1, 2], "max_tokens": 1})
    assert status == code, reply
    if said:
        assert said in reply["error"]["message"]
    served.check_alone("math", PROMPTS[0])


def test_ranks_beyond_the_largest_are_refused_with_numbers(served: AdapterServer) -> None:
    assert served.server.load("lora2", served.folder / "lora")[0] == 200
    status, reply = served.server.post("/v1/completions", {"model": "lora+lora2+c++", "prompt": [1], "max_tokens": 1})
    assert served.server.unload("lora2")[0] == 200
    assert status == 400
    assert "LoRA ranks 4 + 4 + 4 = 12, and --max-lora-rank is 8; start the server with" in reply["error"]["message"]


def test_a_member_that_is_loaded_again_or_unloaded_makes_another_sum_or_none(served: AdapterServer) -> None:
    place = served.folder / "changing"
    served.references["changing"] = write_soka(place, random_factors(ALPHA, 1, seed=7, scale=0.02))
    assert served.server.load("changing", place)[0] == 200
    ask_as(served, "changing+0.5*math", (1, "changing"), (0.5, "math"))
    shutil.rmtree(place)
    served.references["changing"] = write_soka(place, random_factors(ALPHA, 2, seed=8, scale=0.02))
    ask_as_before = served.server.ask("changing+0.5*math", PROMPTS[0])  # it was not loaded again yet
    served.check(["changing+0.5*math"], [ask_as_before], [PROMPTS[0]])
    assert served.server.load("changing", place, load_inplace=True)[0] == 200
    ask_as(served, "changing+0.5*math", (1, "changing"), (0.5, "math"))
    assert served.server.unload("changing")[0] == 200
    status, reply = served.server.post("/v1/completions", {"model": "0.5*math+changing", "prompt": [1]})
    assert status == 404
    assert "no adapter `changing`" in reply["error"]["message"]
    assert served.server.load("changing", served.folder / "code")[0] == 200
    served.references["changing"] = served.references["code"]
    ask_as(served, "changing+0.5*math", (1, "changing"), (0.5, "math"))


def test_many_sums_take_no_more_than_a_few(served: AdapterServer) -> None:
    """Of a hundred sums that are asked for at once every one is answered, and few are kept."""
    texts = [f"{1 + at / 100}*math+code" for at in range(100)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda text: served.server.ask(text, PROMPTS[0], 2), texts))
    want = summed(served.references, (1.5, "math"), (1.0, "code"))
    served.references["1.5*math+code"] = want
    served.check(["1.5*math+code"], [answers[50]], [PROMPTS[0]])
    served.check_alone("1.5*math+code", PROMPTS[0])  # one that has to be made again
    lines = served.server.get("/metrics").splitlines()
    kept = {line for line in lines if line.startswith("soka:prompt_tokens_total") and "*math+code" in line}
    assert len(kept) <= KEPT
    listed = [card["id"] for card in served.server.get("/v1/models")["data"]]
    assert listed == ["base", "math", "code", "other", "lora", "c++", "built", "changing"]
    status, reply = served.server.load("x", "soka-sum:[]")
    assert status == 400
    assert "a sum of adapters is not loaded" in reply["error"]["message"]


# --- without a server -------------------------------------------------------------------------------------------------

ASK = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from soka_vllm.sums import sum_request

adapters = {"math": LoRARequest("math", 1, sys.argv[2]), "lora": LoRARequest("lora", 2, sys.argv[3])}
lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "lora_target_modules": sys.argv[4].split()}
model = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4, **lora)
sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True)
asked = sum_request("math+0.5*lora", adapters)
(reply,) = model.generate({"prompt_token_ids": json.loads(sys.argv[5])}, sampling, lora_request=asked)
out = reply.outputs[0]
logprobs = [step[token].logprob for step, token in zip(out.logprobs, out.token_ids)]
print("ANSWER", json.dumps([list(out.token_ids), logprobs]))
"""


def test_the_llm_class(tmp_path: Path) -> None:
    """The members were never asked for; they are loaded for the sum."""
    references = {
        "base": base_model(),
        "math": write_soka(tmp_path / "math", random_factors(ALPHA, 1, seed=1, scale=0.02)),
        "lora": write_peft(tmp_path / "lora", LORA, seed=4),
    }
    references["sum"] = summed(references, (1, "math"), (0.5, "lora"))
    environment = {**ONE_PROCESS, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [base_directory(), tmp_path / "math", tmp_path / "lora", " ".join(TARGET_OPTIONS[1:]), PROMPTS[0]]
    command = [preloaded.CODE, ASK, *map(str, arguments)]
    done = preloaded.run("vllm", command, cwd=tmp_path, env=environment, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    tokens, logprobs = json.loads(lines[0].removeprefix("ANSWER "))
    AdapterServer(Server("", tmp_path / "log"), references, tmp_path).check(["sum"], [(tokens, logprobs)], [PROMPTS[0]])
