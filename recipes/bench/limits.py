"""What one chip can do at most: scores a second, by the unit that binds.

The rates were measured on an H200: 132 multiprocessors, each with 16 exponentials a clock at 1.83 GHz; tensor cores
788 TFLOP/s in bf16 on random data; memory by the data sheet. Forward, a score takes one exponential and 4 C + 2 R
operations, R rounded up to 16, as products are; backward, in one pass, another exponential and 10 C + 6 R.
"""

from __future__ import annotations

from .workloads import Workload

EXPONENTIALS = 132 * 16 * 1.83e9
OPERATIONS = 788e12
BYTES = 4.8e12
WIDTH = 16


def scores_per_second(device: str, workload: Workload, mode: str) -> float | None:
    """The limit for a workload in bf16 on the device of that name, or None for one that is not known."""
    if "H200" not in device:
        return None
    w, both = workload, mode == "fwdbwd"
    rank = -(-w.rank // WIDTH) * WIDTH
    operations = 4 * w.head_dim + 2 * rank + both * (10 * w.head_dim + 6 * rank)
    # Query, key, value and output once; on the way back they are read again, and as many gradients read or written.
    elements = 2 * w.batch * w.heads * w.head_dim * (w.n_q + w.n_k) * (3 if both else 1)
    seconds = max(
        w.scores * (2 if both else 1) / EXPONENTIALS, w.scores * operations / OPERATIONS, 2 * elements / BYTES
    )
    return w.scores / seconds
