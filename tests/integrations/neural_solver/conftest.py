"""Neural-Solver-Library, small, with weights of distances that matter and have both signs.

It is not packaged: a stand-in of ours in `checkout/`, or with `NEURAL_SOLVER_LIBRARY` a real checkout.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flashbias.integrations._torchvision import make_importable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STAND_IN = Path(__file__).parent / "checkout"
CHECKOUT = os.environ.get("NEURAL_SOLVER_LIBRARY") or str(STAND_IN)
NAMES = ("models", "layers", "exp", "utils", "data_provider")


@pytest.fixture
def neural_solver() -> Iterator[Any]:
    """The integration, waiting for its host; taken out afterwards, and no trace of a checkout remains."""
    make_importable()
    module = importlib.import_module("flashbias.integrations.neural_solver")
    forget_checkout()
    module.INTEGRATION.apply_when_imported()
    yield module
    module.configure()
    module.revert()
    forget_checkout()


def forget_checkout() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        del sys.modules[name]


@pytest.fixture
def load(neural_solver: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """`load(folder)` imports the `models.Transformer_Spatial_Bias` in a folder."""

    def inside(folder: str | Path) -> ModuleType:
        monkeypatch.syspath_prepend(str(folder))
        return importlib.import_module("models.Transformer_Spatial_Bias")

    return inside


@pytest.fixture
def host(load: Callable[..., ModuleType]) -> ModuleType:
    """The module `models.Transformer_Spatial_Bias`, patched."""
    return load(CHECKOUT)


@pytest.fixture
def applied(neural_solver: Any) -> Any:
    return neural_solver


def options(space: int = 2, features: int = 0, layers: int = 2, **others: Any) -> SimpleNamespace:
    settings = {"unified_pos": 0, "geotype": "unstructured", "time_input": False, "act": "gelu", "dropout": 0.0}
    settings |= {"n_hidden": 32, "n_heads": 2, "n_layers": layers, "mlp_ratio": 1, "out_dim": 1}
    return SimpleNamespace(**(settings | {"space_dim": space, "fun_dim": features} | others))


@pytest.fixture
def make_model(host: ModuleType) -> Callable[..., torch.nn.Module]:
    """`make_model(space=2, features=0, layers=2)`: hidden 32, 2 heads, weights drawn anew."""

    def make(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model = host.Model(options(*args, **kwargs))
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                if "pos_weight" in name:
                    parameter.normal_(std=0.5)
                elif parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
        return model.to(DEVICE)

    return make
