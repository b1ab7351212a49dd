"""The data of a report, for its tests and those of the model card."""

from __future__ import annotations

from soka_serve.compiler.init.result import ModuleInit
from soka_serve.compiler.report.data import AnswerPair, HistoryPoint, ReportData
from soka_serve.kron.shapes import FactorShape

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def spectra(layers: int, *, terms: int = 8, rank: int | None = 2) -> list[ModuleInit]:
    """Modules with sigma = 1/k; rank None varies the rank with the layer."""
    return [
        ModuleInit(
            module=f"model.layers.{layer}.{projection}",
            layer=layer,
            out_features=64,
            in_features=32,
            factor_shape=FactorShape(8, 4, 8, 8),
            sigma=tuple(1 / k for k in range(1, terms + 1)),
            total_energy=2.0,
            rank=layer + 1 if rank is None else rank,
            init="weights",
            policy="fixed",
        )
        for layer in range(layers)
        for projection in PROJECTIONS
    ]


def report_data(modules: list[ModuleInit]) -> ReportData:
    """A build of the embedded base."""
    return ReportData(
        name="math",
        description="Two-step sums.",
        base_name="builtin:tiny",
        method="soka",
        created="2026-01-31T12:30:05+00:00",
        versions={"torch": "2.13.0"},
        seed=7,
        modules=modules,
        history=[HistoryPoint(10 * k, 3.0 / k, 1.0, 1e-3, 4.0 / k if k % 2 == 0 else None) for k in range(1, 11)],
        samples=[AnswerPair("What is 1 + 2?", "#### 3", "#### 4", "#### 3", False, True)],
        accuracy_before=(4, 200),
        accuracy_after=(186, 200),
        trainable_parameters=13104,
        base_parameters=737920,
        comparison={"LoRA r=1": 9216, "LoRA r=2": 18432, "full": 737920},
        adapter_bytes=54640,
        dropped_energy_frac=0.0,
        data_summary={"examples": 4000, "eval": {"examples": 200}},
        manifest_text='schema = 1\n[base]\nbuiltin = "tiny"\n',
        lock={"base": {"sha256": "ab" * 32}, "ranks": {m.module: m.rank for m in modules}},
        artefacts={"adapter": "adapter", "model_card": "adapter/README.md"},
        rank_over_time=None,
        timings_s={"init": 3.2, "tune": 92.0},
    )
