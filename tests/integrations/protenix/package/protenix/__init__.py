"""A stand-in for Protenix: its names, signatures and arithmetic where the integration meets it, nothing else.

`FLASHBIAS_PROTENIX_PATH` makes the same tests use the real package.
"""
