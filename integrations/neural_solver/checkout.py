"""The checkout: how it is recognised, and what it lacks on a machine without a GPU.

`models`, `layers` and `exp` are names that other projects use too.
"""

import importlib.abc
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from flashbias.patches import HostMissingError, OtherHostError, PatchSet, attributes_read, disabled

from . import attention

logger = logging.getLogger("flashbias.integrations")

_PARTS = {"to_q", "to_k", "to_v", "to_out", "pos_weight", "heads", "scale"}


def is_model(source: str) -> bool:
    """Whether that is the source of the host's `models.Transformer_Spatial_Bias`."""
    return attributes_read(source, "Spatial_Bias_Attention.forward") == _PARTS


def is_kernels(source: str) -> bool:
    """Whether that is the source of the host's `layers.flash_bias_triton`."""
    return "class FlashBiasFunc(" in source


def find(folder: Path | str) -> Path:
    """The folder, if it is a checkout of Neural-Solver-Library.

    Raises `HostMissingError` for a folder that is none, `OtherHostError` for another project's.
    """
    folder, wanted = Path(folder).absolute(), "a checkout of github.com/thuml/Neural-Solver-Library"
    file = folder / "models" / "Transformer_Spatial_Bias.py"
    if not file.is_file() or not (folder / "run.py").is_file():
        missing = file if not file.is_file() else folder / "run.py"
        raise HostMissingError(f"no {missing}", wanted, "name its top folder")
    if not is_model(file.read_text(encoding="utf-8", errors="replace")):
        raise OtherHostError(f"{file}, which is other code", wanted, "name its top folder")
    return folder


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the host's kernels, and has them imported where they cannot be compiled."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != attention.KERNELS or torch.cuda.is_available() or disabled():
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or spec.origin is None:
            return spec
        if is_kernels(Path(spec.origin).read_text(encoding="utf-8", errors="replace")):
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The module as it is, or, where triton is not there to make its kernels, with our function and nothing else."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self._loader.exec_module(module)
        except Exception as error:  # what triton raises without a driver depends on its version
            logger.warning(
                f"neural_solver: {attention.KERNELS} cannot be imported here ({error}); flashbias stands in for it"
            )
            module.flash_bias_func = _StandIn.apply  # type: ignore[attr-defined]


class _StandIn:
    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """The parameters are those of the host's, so that it can be patched like that one."""
        return attention.flash_bias_func(*args, **kwargs)


def make_kernels_importable() -> None:
    """Have the model imported where triton or the GPU is missing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        place = sys.meta_path.index(PathFinder) if PathFinder in sys.meta_path else len(sys.meta_path)
        sys.meta_path.insert(place, _Finder())


def follow(patches: PatchSet) -> None:
    """Without a GPU, `.cuda()` in the checkout's own files does nothing while the model is patched."""
    module = sys.modules.get(patches.patches[0].module)
    file = getattr(module, "__file__", None)
    if patches.is_applied() and file is not None and not torch.cuda.is_available():
        _stay.put(os.path.dirname(os.path.dirname(os.path.abspath(file))))
    else:
        _stay.restore()


def rebind(kernels: PatchSet) -> None:
    """Have the model call what `layers.flash_bias_triton` holds now: it has imported the function by its name."""
    patch = kernels.patches[0]
    host, model = sys.modules.get(patch.module), sys.modules.get("models.Transformer_Spatial_Bias")
    if host is None or model is None:
        return
    original = getattr(host, attention.KERNEL_KEPT, host.flash_bias_func)
    if any(getattr(model, "flash_bias_func", None) is function for function in (patch.replacement, original)):
        model.flash_bias_func = host.flash_bias_func  # type: ignore[attr-defined]


class _Stay:
    """Replaces `Tensor.cuda` and `Module.cuda` for callers whose source lies in a folder; others get what they had."""

    def __init__(self) -> None:
        self._replaced: dict[type, Any] = {}

    def put(self, folder: str) -> None:
        if not self._replaced:
            logger.warning(f"neural_solver: no GPU: .cuda() in {folder} leaves everything on the CPU")
            for owner in (torch.Tensor, torch.nn.Module):
                self._replaced[owner] = (vars(owner).get("cuda"), _staying(owner.cuda, folder))
                setattr(owner, "cuda", self._replaced[owner][1])  # noqa: B010 - a type checker would refuse the other

    def restore(self) -> None:
        for owner, (original, ours) in self._replaced.items():
            if vars(owner).get("cuda") is not ours:
                continue  # somebody has replaced it since
            if original is None:  # inherited
                delattr(owner, "cuda")
            else:
                setattr(owner, "cuda", original)  # noqa: B010
        self._replaced.clear()


def _staying(original: Any, folder: str) -> Any:
    def cuda(self: Any, *args: Any, **kwargs: Any) -> Any:
        caller = os.path.abspath(sys._getframe(1).f_code.co_filename)
        if caller.startswith(folder + os.sep):
            return self
        return original(self, *args, **kwargs)

    return cuda


_stay = _Stay()
