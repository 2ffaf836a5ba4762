"""Modules for models of your own."""

from .spatial_attention import SpatialAttention

__all__ = ["SpatialAttention"]
