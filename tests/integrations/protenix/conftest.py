"""Protenix, small, with weights that make every bias and gate matter.

Protenix pins a torch of its own, so nothing installs it for tests: they use a stand-in of ours in `package/`, or, with
`FLASHBIAS_PROTENIX_PATH`, the real one in a folder (made by `pip install --no-deps --target`).
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
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REAL = os.environ.get("FLASHBIAS_PROTENIX_PATH")
PACKAGE = REAL or str(Path(__file__).parent / "package")


def write_version(folder: Path, version: str) -> str:
    """Have the folder say that it has a distribution `protenix` of that version."""
    info = folder / f"protenix-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: protenix\nVersion: {version}\n")
    return str(folder)


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Where Protenix and its version are found."""
    if REAL:
        return [PACKAGE]
    return [PACKAGE, write_version(tmp_path_factory.mktemp("versions"), "2.0.0")]


@pytest.fixture
def protenix(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The integration, applied with default settings; taken out afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path, *paths])
    monkeypatch.setenv("LAYERNORM_TYPE", "torch")  # Protenix' own one is compiled at import, for a GPU
    module = importlib.import_module("flashbias.integrations.protenix")
    module.apply()
    yield module
    module.configure()
    module.revert()


@pytest.fixture
def applied(protenix: Any) -> Any:
    return protenix


@pytest.fixture
def host(protenix: Any) -> SimpleNamespace:
    """The modules of Protenix that are patched."""

    def module(name: str) -> ModuleType:
        return importlib.import_module(f"protenix.model.{name}")

    return SimpleNamespace(
        triangular=module("triangular.triangular"),
        transformer=module("modules.transformer"),
        model=module("protenix"),
        primitives=module("modules.primitives"),
    )


@pytest.fixture
def calls(protenix: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The keyword and positional arguments of every call of the operator by a replacement."""
    made: list[Any] = []
    for module in (protenix.triangle, protenix.pair_bias, protenix.local):

        def counting(*args: Any, operator: Any = module.biased_attention, **kwargs: Any) -> Any:
            made.append((args, kwargs))
            return operator(*args, **kwargs)

        monkeypatch.setattr(module, "biased_attention", counting)
    return made


def give_structure(module: nn.Module) -> nn.Module:
    """Half of Protenix' matrices start at zero: draw all weights anew."""
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)
    return module.to(DEVICE)


@pytest.fixture
def make_triangle(host: SimpleNamespace) -> Callable[..., nn.Module]:
    """`make_triangle(starting=True, heads=3, c=24)`: a triangle attention of head dim 8."""

    def make(starting: bool = True, heads: int = 3, c: int = 24) -> nn.Module:
        cls = host.triangular.TriangleAttention if starting else host.triangular.TriangleAttentionEndingNode
        return give_structure(cls(c, 8, heads))

    return make
