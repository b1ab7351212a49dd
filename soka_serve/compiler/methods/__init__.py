"""The registry of training methods: one row each; the rest of the compiler asks the row and compares no names.

A further method is a file here, or an option of one that is here, and a row in `METHODS`. What is held equal: the
modules, the data, the schedule, and alpha = scale * rank, so that a rank-r update has no factor but `scale`; each file
names its exceptions. Methods that are not `in_manifests` are trained by
comparisons only: no engine that we serve with loads what they make.

Importing this package loads neither torch nor PEFT.
"""

from __future__ import annotations

from soka_serve.compiler.methods.adalora import AdaLora
from soka_serve.compiler.methods.cdka import Cdka
from soka_serve.compiler.methods.corda import Corda
from soka_serve.compiler.methods.eva import Eva
from soka_serve.compiler.methods.full import Full
from soka_serve.compiler.methods.lokr import Lokr
from soka_serve.compiler.methods.lora import Dora, Lora
from soka_serve.compiler.methods.method import DenseOutput, Method, StartingPoint
from soka_serve.compiler.methods.osf import Osf
from soka_serve.compiler.methods.pissa import Pissa
from soka_serve.compiler.methods.soka import Soka

__all__ = ["FULL", "LORA", "METHODS", "PISSA", "DenseOutput", "Method", "StartingPoint", "in_manifests"]

LORA = Lora("lora", "LoRA", in_manifests=True)
PISSA = Pissa("pissa", "PiSSA", in_manifests=True)
FULL = Full("full", "full fine-tuning", in_manifests=True)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Soka("soka", "SoKA", in_manifests=True),
        FULL,
        LORA,
        PISSA,
        Lora("rslora", "rsLoRA", options={"use_rslora": True}),
        Dora("dora", "DoRA", options={"use_dora": True}),
        Lokr("lokr", "LoKr", in_manifests=True),
        Cdka("cdka", "CDKA"),
        AdaLora("adalora", "AdaLoRA"),
        Corda("corda", "CorDA"),
        Eva("eva", "EVA"),
        Osf("osf", "OSF"),
    )
}
"""By the name that manifests and suites write, in the order in which messages list them."""


def in_manifests() -> list[str]:
    """Names of the methods that `[train] method` may say."""
    return [method.name for method in METHODS.values() if method.in_manifests]
