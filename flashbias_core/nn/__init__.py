"""Modules for people who write their own model."""

from .alibi_attention import ALiBiAttention, KeyValueCache, alibi_slopes

__all__ = ["ALiBiAttention", "KeyValueCache", "alibi_slopes"]
