"""The SoKA adapter as a PEFT method. Importing this package registers the PEFT type "SOKA".

>>> import torch, peft
>>> import soka_serve.peft
>>> base = torch.nn.Sequential(torch.nn.Linear(12, 8, bias=False))
>>> x = torch.ones(2, 12)
>>> before = base(x)
>>> model = peft.get_peft_model(base, soka_serve.peft.SokaConfig(r=2, target_modules=["0"]))
>>> torch.equal(model(x), before)  # the base is never rewritten, and nothing changes at step 0
True
>>> model.peft_config["default"].soka_modules
{'0': {'rank': 2, 'shape': [4, 3, 2, 4]}}
"""

from soka_serve.peft import registration  # first: it checks PEFT's version
from soka_serve.peft.config import SokaConfig
from soka_serve.peft.factors import build_soka_model, drop_terms, get_factors, soka_layers, term_energies
from soka_serve.peft.hotswap import hotswap_adapter
from soka_serve.peft.layer import SokaLinear
from soka_serve.peft.model import SokaModel
from soka_serve.peft.optimizer import create_soka_optimizer
from soka_serve.peft.patches import apply_patches

registration.register(SokaConfig, SokaModel)
apply_patches(registration.add_peft_type())

__all__ = [
    "SokaConfig",
    "SokaLinear",
    "SokaModel",
    "build_soka_model",
    "create_soka_optimizer",
    "drop_terms",
    "get_factors",
    "hotswap_adapter",
    "soka_layers",
    "term_energies",
]
