"""SwinV2 of timm and of Microsoft, small, with weights that make the bias matter.

Microsoft's code is not packaged: a stand-in of ours in `checkout/`, or with `FLASHBIAS_SWIN_REPO` a real checkout.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashbias.integrations import integration, profile, verify
from flashbias.integrations._torchvision import make_importable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


CHECKOUT = os.environ.get("FLASHBIAS_SWIN_REPO") or str(Path(__file__).parent / "checkout")
HOSTS = ("timm", "microsoft")
both_hosts = pytest.mark.parametrize("host", HOSTS, indirect=True)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("FLASHBIAS_DISABLE", "FLASHBIAS_VERIFY", "FLASHBIAS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    integration._said.clear()
    integration._called.clear()
    verify.forget()
    profile.forget()
    yield
    verify.forget()
    torch.compiler.reset()


@pytest.fixture
def swin_v2() -> Iterator[Any]:
    """The integration, applied with default settings; taken out afterwards."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    make_importable()
    module = importlib.import_module("flashbias.integrations.swin_v2")
    module.apply()
    yield module
    module.configure()
    module.revert()


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Any:
    """The module `timm.models.swin_transformer_v2`, or Microsoft's (parametrize with `both_hosts`)."""
    if getattr(request, "param", "timm") == "microsoft":
        return request.getfixturevalue("microsoft")
    request.getfixturevalue("swin_v2")
    return importlib.import_module("timm.models.swin_transformer_v2")


@pytest.fixture
def import_models(swin_v2: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """`import_models(folder)` imports the `models.swin_transformer_v2` in a folder; no trace of it remains."""

    def load(folder: str) -> ModuleType:
        monkeypatch.syspath_prepend(folder)
        return importlib.import_module("models.swin_transformer_v2")

    yield load
    swin_v2.revert()
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        del sys.modules[name]


@pytest.fixture
def microsoft(import_models: Callable[[str], ModuleType]) -> ModuleType:
    """The module `models.swin_transformer_v2` of Microsoft's code, patched."""
    return import_models(CHECKOUT)


@pytest.fixture
def applied(swin_v2: Any) -> Any:
    """The integration that `stock` takes out for a while; each folder has its own."""
    return swin_v2


@pytest.fixture
def stock(applied: Any) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """`with stock(): ...` runs the host's own code."""

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        applied.revert()
        try:
            yield
        finally:
            applied.apply()

    return inside


@pytest.fixture
def transformers() -> Any:
    """The library, whichever version stands first on the path."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    make_importable()
    return importlib.import_module("transformers")


def give_structure(module: torch.nn.Module) -> torch.nn.Module:
    """Fresh weights leave every bias at 8 and every block at nothing: draw those that matter anew.

    The scale stays below 30, so that timm's -100 between parts of a window is as good as minus infinity.
    """
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if "cpb_mlp.2" in name:
                parameter.normal_(std=0.3)
            elif "cpb_mlp" in name:
                parameter.normal_(std=1.0)
            elif "logit_scale" in name:
                parameter.copy_(torch.linspace(3, 20, len(parameter)).log().view_as(parameter))
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.5)
    return module


@pytest.fixture
def make_model(host: Any) -> Callable[..., torch.nn.Module]:
    """`make_model(**options)`: two stages, 16 windows of 4 x 4 with every second block shifted, then 4."""

    def make(**options: Any) -> torch.nn.Module:
        settings: dict[str, Any] = {"img_size": 32, "patch_size": 2, "in_chans": 1, "num_classes": 5, "window_size": 4}
        settings |= {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "drop_path_rate": 0.0}
        return give_structure(host.SwinTransformerV2(**(settings | options))).to(DEVICE).eval()

    return make


@pytest.fixture
def small_model(make_model: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """`small_model(**options)`: the first of those stages alone."""
    return lambda **options: make_model(**({"depths": (2,), "num_heads": (2,)} | options))
