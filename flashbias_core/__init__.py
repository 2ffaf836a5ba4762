"""Attention with an additive bias, `softmax(scale * Q K^T + B) V`, with memory that grows with N and not with N^2."""

from ._version import __version__
from .attention import biased_attention, flash_bias_func
from .biases import ALiBi, Bias, DenseBias, FactoredBias, RelativePositionBias, SpatialDistance
from .errors import FlashBiasError
from .masks import Causal, KeyPadding, Mask, Segments
from .reference import reference

__all__ = [
    "ALiBi",
    "Bias",
    "Causal",
    "DenseBias",
    "FactoredBias",
    "FlashBiasError",
    "KeyPadding",
    "Mask",
    "RelativePositionBias",
    "Segments",
    "SpatialDistance",
    "__version__",
    "biased_attention",
    "flash_bias_func",
    "reference",
]
