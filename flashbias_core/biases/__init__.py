"""The kinds of bias. A new kind is a subclass of `Bias` in a file of its own."""

from .alibi import ALiBi
from .base import Bias, Sum
from .distance import SpatialDistance
from .factored import FactoredBias
from .matrix import DenseBias
from .relative import RelativePositionBias

__all__ = ["ALiBi", "Bias", "DenseBias", "FactoredBias", "RelativePositionBias", "SpatialDistance", "Sum"]
