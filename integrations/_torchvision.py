"""For the demo and the tests: make a torchvision that was built for CUDA importable under a CPU build of torch.

timm imports torchvision. torchvision's wheel in the package index is built against CUDA; under a torch without CUDA its
compiled operators cannot be loaded, and its Python code then fails with `operator torchvision::nms does not exist`,
because it registers shapes for two operators without asking whether they are there. Nothing in SwinV2 calls them, so
to declare them is enough.
"""

import importlib
import importlib.util
import sys

import torch

_declared: list[torch.library.Library] = []  # a declaration lives as long as its library object


def make_importable() -> bool:
    """Import torchvision, declaring the two operators if that is what it fails for; returns whether it was.

    Nothing happens where torchvision imports as it is, or is not installed. Other failures are raised.
    """
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
        return False
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    importlib.import_module("torchvision")
    return True
