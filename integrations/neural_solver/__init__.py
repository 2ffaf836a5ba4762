"""Neural-Solver-Library: attention over the points of a mesh, with exact spatial distances, on GPUs and CPUs.

Importing this module patches a checkout of github.com/thuml/Neural-Solver-Library when its model
`Transformer_Spatial_Bias` is imported; `revert()` undoes it. Parameters, their initial values and checkpoints stay what
they are.

- The bias `-w_i |x_i - x_j|^2` comes from Cartesian coordinates relative to the middle of each body, in fp32, wherever
  the body lies. The host goes through spherical angles and casts to half precision. Weights `w_i` are of either sign,
  in fp32 also under autocast, and have their gradients, as coordinates have.
- Queries, keys and values are in half precision on a GPU, as the host has them. Gradients of half precision are scaled
  on their way through the attention, since those of a mean over many points are below its smallest numbers.
- The kernels of `layers.flash_bias_triton` are replaced for every caller.
- Without a GPU, or without triton, the model can be imported, trained and evaluated all the same; there the `.cuda()`
  in the checkout's own files leaves tensors and models where they are.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flashbias.errors import FlashBiasError
from flashbias.integrations.integration import Integration, Replacement
from flashbias.patches import Patch, PatchSet, disabled

from . import attention, checkout
from .checkout import find


class PrecisionError(FlashBiasError, ValueError):
    """A precision that there is not."""


@dataclass(frozen=True)
class Settings:
    """precision: of queries, keys and values: "half", "bfloat16", "single", or "auto".

    "auto" is single on a CPU; on a GPU half, and bfloat16 for more than 65,536 points: half precision holds a mean
    weight of attention, 1 / N, with fewer bits from there on.
    """

    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.precision != "auto" and self.precision not in attention.DTYPES:
            wanted = ", ".join(("auto", *attention.DTYPES))
            raise PrecisionError(f"precision={self.precision!r}", wanted, "choose one of these")


def forward(self: Any, x: Tensor, q_bias: Tensor, k_bias: Tensor) -> Tensor:
    """`Spatial_Bias_Attention.forward`."""
    return _replacement(self, x, q_bias, k_bias)


def _compute(module: Any, x: Tensor, q_bias: Tensor, k_bias: Tensor) -> Tensor:
    return attention.attention(module, x, q_bias, k_bias, INTEGRATION.settings.precision)


_KEPT = "forward_before_flashbias"
_replacement = Replacement("neural_solver", _compute, attention.not_covered, original=_KEPT)

HOST = "thuml/Neural-Solver-Library"
MODEL = PatchSet(
    Patch(
        "models.Transformer_Spatial_Bias:Spatial_Bias_Attention.forward",
        forward,
        ("self", "x", "q_bias", "k_bias"),
        keep_as=_KEPT,
    ),
    Patch(
        "models.Transformer_Spatial_Bias:Model.get_matrix",
        attention.get_matrix,
        ("self", "original_pos"),
        keep_as="get_matrix_before_flashbias",
    ),
    host=HOST,
    recognise=checkout.is_model,
)
KERNELS = PatchSet(
    # What the host calls so is the `apply` of an autograd function.
    Patch(
        f"{attention.KERNELS}:flash_bias_func",
        attention.flash_bias_func,
        ("args", "kwargs"),
        keep_as=attention.KERNEL_KEPT,
    ),
    host=f"{HOST}, kernels",
    recognise=checkout.is_kernels,
)
INTEGRATION = Integration("neural_solver", MODEL, KERNELS, settings=Settings())
revert, is_applied = INTEGRATION.revert, INTEGRATION.is_applied

__all__ = ["INTEGRATION", "PrecisionError", "Settings", "apply", "configure", "find", "is_applied", "revert"]


def apply() -> bool:
    """Patch the checkout, at once if its model is imported, otherwise when it is; returns whether anything changed.

    Raises `flashbias.patches.HostMissingError` where there is no module `models.Transformer_Spatial_Bias`,
    `OtherHostError` where it is another project's, and other `PatchError`s for a checkout that cannot be patched.
    """
    if not disabled() and not MODEL.is_applied() and (obstacle := MODEL.obstacle()) is not None:
        raise obstacle
    return INTEGRATION.apply()


def configure(*, precision: str = "auto") -> None:
    """Choose the precision of queries, keys and values; see `Settings`.

    Raises `PrecisionError` for one that there is not.
    """
    INTEGRATION.configure(Settings(precision))


MODEL.on_change(checkout.follow)
KERNELS.on_change(checkout.rebind)
checkout.make_kernels_importable()
INTEGRATION.apply_when_imported()
