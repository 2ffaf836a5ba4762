"""Modules for models of your own."""

from .alibi_attention import ALiBiAttention, KeyValueCache, alibi_slopes
from .spatial_attention import SpatialAttention

__all__ = ["ALiBiAttention", "KeyValueCache", "SpatialAttention", "alibi_slopes"]
