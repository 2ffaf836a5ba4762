"""SwinV2 of timm, small, with weights that make the bias matter."""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from flashbias.integrations import integration, verify
from flashbias.integrations._torchvision import make_importable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("FLASHBIAS_DISABLE", "FLASHBIAS_VERIFY"):
        monkeypatch.delenv(name, raising=False)
    integration._said.clear()
    verify.forget()
    yield
    torch.compiler.reset()


@pytest.fixture
def host() -> Any:
    """The module `timm.models.swin_transformer_v2`."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    make_importable()
    return importlib.import_module("timm.models.swin_transformer_v2")


@pytest.fixture
def swin_v2(host: Any) -> Iterator[Any]:
    """The integration, applied; taken out afterwards."""
    module = importlib.import_module("flashbias.integrations.swin_v2")
    module.apply()
    yield module
    module.revert()


@pytest.fixture
def stock(swin_v2: Any) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """`with stock(): ...` runs timm's own code."""

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        swin_v2.revert()
        try:
            yield
        finally:
            swin_v2.apply()

    return inside


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
