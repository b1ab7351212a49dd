"""Other optimisers than AdamW: which there are, that the factors' rates hold with them, and resuming."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from transformers.training_args import OptimizerNames

from soka_serve.adapter.format import read_adapter
from soka_serve.cli import main
from soka_serve.compiler.train import installed
from soka_serve.compiler.train import trainer as trainer_module
from soka_serve.compiler.train.callbacks import ResumePoints
from soka_serve.compiler.train.optimisers import make_optimiser
from soka_serve.compiler.train.trainer import SokaTrainer
from soka_serve.errors import BuildError, ManifestError, PlanError
from soka_serve.manifest.optimisers import OPTIMISERS, REFUSED
from soka_serve.manifest.read import read_manifest
from tests.support.training import make_base, make_factors, make_manifest, run_training, tensors_of

RATE = 5e-2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("optimisers") / "base")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """An optimiser, if what it needs is installed."""
    if package := OPTIMISERS[request.param].package:
        pytest.importorskip(package)
    chosen: str = request.param
    return chosen


def test_every_one_of_the_trainers_is_taken_or_refused() -> None:
    names = {name.value for name in OptimizerNames}
    assert OPTIMISERS.keys() - {"adamw"} | REFUSED.keys() >= names
    assert not OPTIMISERS.keys() & REFUSED.keys()
    assert {optimiser.trainer for optimiser in OPTIMISERS.values()} <= names


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("lines", "place", "words"),
    [
        ('optimiser = "adafactr"', "6:13", "did you mean 'adafactor'?"),
        ('optimizer = "adafactor"', "6:1", "unknown key (did you mean 'optimiser'?)"),
        ('optim = "adafactor"', "6:1", "unknown key (did you mean 'optimiser'?)"),
        ('optimiser = "sgd"', "6:1", "does not go with method = 'soka'"),
        ('optimiser = "rmsprop"', "6:1", "move values by ten times their rate"),
        ('optimiser = "galore_adamw"', "6:1", "it belongs to method = 'full'; the method is 'soka'"),
        ('optimiser = "apollo_adamw"\nmethod = "lora"', "6:1", "it belongs to method = 'full'; the method is 'lora'"),
        ('optimiser = "lomo"', "6:13", "it steps within the backward pass"),
        ('optimiser = "schedule_free_adamw"', "6:13", "the Trainer's schedule_free_adamw is refused"),
        (
            'optimiser = "adafactor"\nprune = { threshold = 0.1 }',
            "7:1",
            "prune does not go with optimiser = 'adafactor'",
        ),
    ],
)
def test_what_does_not_go(tmp_path: Path, lines: str, place: str, words: str) -> None:
    file = tmp_path / "m.toml"
    file.write_text(
        f'schema = 1\n[base]\nbuiltin = "tiny"\n[train]\nsteps = 1\n{lines}\n[train.data]\nbuiltin = "math"\n'
    )
    with pytest.raises(ManifestError) as caught:
        read_manifest(file)
    assert f"m.toml:{place}: train." in caught.value.message
    assert words in caught.value.message


@pytest.mark.parametrize("lines", ['optimiser = "sgd"\nmethod = "lora"', 'optimiser = "galore_adamw"\nmethod = "full"'])
def test_what_goes_with_other_methods(tmp_path: Path, lines: str) -> None:
    file = tmp_path / "m.toml"
    file.write_text(f'schema = 1\n[base]\nbuiltin = "tiny"\n[train]\n{lines}\n[train.data]\nbuiltin = "math"\n')
    read_manifest(file)


def test_a_package_that_is_not_installed_stops_a_build_before_its_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.toml"
    train = '[train]\nsteps = 1\noptimiser = "adamw_8bit"\n[train.data]\nbuiltin = "math"\nlimit = 8\n'
    file.write_text('schema = 1\n[base]\nbuiltin = "tiny"\n' + train)
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["build", str(file), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert 'train.optimiser: "adamw_8bit" needs the package bitsandbytes, which is not installed' in done.output
    assert "pip install bitsandbytes" in done.output
    assert not list((tmp_path / "out").rglob("init*"))


@pytest.mark.parametrize(
    ("name", "version", "refused"), [("adamw", "2", False), ("adafactor", "2", True), ("adafactor", "1", False)]
)
def test_what_cannot_step_sharded_parameters(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str, refused: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(PlanError, match=r'"adafactor" does not go with FSDP 2') if refused else nullcontext():
        installed.check_installed(make_manifest(optimiser=name).train)


def test_what_cannot_be_made_here(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match='"paged_adamw_8bit" needs a GPU, and there is none'):
        run_training(base, tmp_path / "paged", optimiser="paged_adamw_8bit")

    def too_old(*_: Any) -> Any:
        raise ImportError("You need to have torchao>=0.4.0")

    monkeypatch.setattr(SokaTrainer, "get_optimizer_cls_and_kwargs", too_old)
    with pytest.raises(BuildError, match=r'train\.optimiser = "adafactor": You need to have torchao'):
        run_training(base, tmp_path / "old", optimiser="adafactor")


# ------------------------------------------------------------------------------------------------------------- rates


def first_step(base: Path, work: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """One step at full rate: by factor, its gradient (all together of norm 1) and its move over its rate, float64."""
    gradients: dict[str, Tensor] = {}
    clip = SokaTrainer._clip_grad_norm

    def noted(self: SokaTrainer, model: torch.nn.Module) -> Any:
        norm = clip(self, model)
        for key, p in model.named_parameters():
            if p.grad is not None:
                gradients[key] = p.grad.double().clone()
        return norm

    monkeypatch.setattr(SokaTrainer, "_clip_grad_norm", noted)
    options = {"learning_rate": RATE, "left_lr": 4.0, "sigma_lr": 1.0, "optimiser": name}
    result = run_training(base, work, steps=1, warmup_frac=0.0, schedule="constant", **options)
    trained, starts = read_adapter(result.directory).factors, make_factors(base)
    found = {}
    for key, gradient in gradients.items():
        module, _, part = key.removeprefix("base_model.model.").partition(".soka_")
        part = part.partition(".")[0]
        start = starts[module]
        width = 1 if part == "sigma" else start.shape.spread
        before, after = (getattr(f, part).double() for f in (start, trained[module]))
        size = float(before.square().mean().sqrt())
        rate = RATE * (4.0 if part == "left" else 1.0) * size / (width * start.rank) ** 0.5 / len(starts) ** 0.25
        found[key] = gradient, (before - after) / rate
    assert len(found) == 3 * len(starts)
    return found


def adafactor(gradient: Tensor) -> Tensor:
    """Its first step without momentum, in float64: arXiv:1804.04235, algorithms 4 and 5 (beta2 is 0 at step 1)."""
    squares = gradient.square() + 1e-30
    if gradient.ndim > 1:
        rows, columns = squares.mean(-1), squares.mean(-2)
        squares = rows[..., :, None] * columns[..., None, :] / rows.mean(-1)[..., None, None]
    update = gradient / squares.sqrt()
    return update / max(1.0, float(update.square().mean().sqrt()))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adagrad", "adamw_8bit", "lion_32bit"], indirect=True)
def test_each_factor_moves_by_its_own_rate(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    oracle = adafactor if name == "adafactor" else torch.sign
    for key, (gradient, move) in first_step(base, tmp_path, monkeypatch, name).items():
        sure = gradient.abs() > 1e-4  # where no epsilon counts
        assert sure.any(), key
        torch.testing.assert_close(move[sure], oracle(gradient)[sure], rtol=2e-3, atol=2e-3, msg=key)


@pytest.mark.parametrize("name", ["adafactor", "adamw_8bit"], indirect=True)
def test_it_trains_otherwise_than_adamw_and_goes_on_after_an_interruption(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options: dict[str, Any] = {"steps": 6, "save_every": 3, "optimiser": name, "weight_decay": 0.1, "sigma_lr": 1.0}
    straight = tensors_of(run_training(base, tmp_path / "straight", **options))
    assert (
        straight.keys() == (other := tensors_of(run_training(base, tmp_path / "adamw", steps=6, sigma_lr=1.0))).keys()
    )
    assert all(not torch.equal(straight[key], other[key]) for key in straight if not key.endswith("_initial"))
    interrupt(monkeypatch, after=3)
    with pytest.raises(KeyboardInterrupt):
        run_training(base, tmp_path / "again", **options)
    monkeypatch.undo()
    again = tensors_of(run_training(base, tmp_path / "again", **options))
    assert all(torch.equal(straight[key], again[key]) for key in straight)


def interrupt(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    saved = ResumePoints.on_save

    def stop(self: ResumePoints, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved(self, args, state, control, **kwargs)
        if state.global_step == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResumePoints, "on_save", stop)


# --------------------------------------------------------------------------------------- projections of gradients


PROJECTING = ("galore_adamw", "apollo_adamw")


@pytest.mark.filterwarnings("ignore")  # the packages' own, about themselves
@pytest.mark.parametrize("name", PROJECTING, indirect=True)
def test_projections_are_of_the_trained_weights_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made = []

    def noted(*given: Any) -> Any:
        made.append(make_optimiser(*given))
        return made[-1]

    monkeypatch.setattr(trainer_module, "make_optimiser", noted)
    options: dict[str, Any] = {"method": "full", "steps": 3, "weight_decay": 0.25}
    projected = tensors_of(run_training(base, tmp_path / "projected", optimiser=name, **options))
    (optimiser,) = made
    assert type(optimiser).__module__.partition(".")[0] == OPTIMISERS[name].package
    assert [("rank" in g, g["weight_decay"], len(g["params"])) for g in optimiser.param_groups] == [
        (False, 0.25, 2),  # embedding and output layer
        (True, 0.25, 14),
        (False, 0.0, 5),  # norms
    ]
    adamw = tensors_of(run_training(base, tmp_path / "adamw", **options))
    assert any(not torch.equal(projected[key], adamw[key]) for key in projected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PROJECTING, indirect=True)
def test_what_their_state_holds_is_read_back_and_nothing_else(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options: dict[str, Any] = {"method": "full", "steps": 6, "save_every": 3, "optimiser": name}
    straight = tensors_of(run_training(base, tmp_path / "straight", **options))
    with monkeypatch.context() as context:
        interrupt(context, after=3)
        with pytest.raises(KeyboardInterrupt):
            run_training(base, tmp_path / "again", **options)
    allowed = set(torch.serialization.get_safe_globals())
    again = tensors_of(run_training(base, tmp_path / "again", **options))
    assert all(torch.equal(straight[key], again[key]) for key in straight)
    assert set(torch.serialization.get_safe_globals()) == allowed
