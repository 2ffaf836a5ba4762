"""Attention with an additive bias: `softmax(scale * Q K^T + B) V`."""

from ._version import __version__ as __version__
