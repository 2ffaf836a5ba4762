"""Protenix: what its attention costs, stock and patched."""
