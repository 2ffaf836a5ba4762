"""What is measured: the workloads, as data, with the gates and goals of attention with a bias.

A tax is a median time over that of SDPA without any bias on the same tensors in the same run, cuDNN's on a GPU. Gates
and goals hold for bf16 on one H200. Factors and dense biases have the dtype of the query, slopes, points and weights
are fp32. Random data: no model stands behind the numbers, only its shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

MODES = ("fwd", "fwdbwd")


class Target(NamedTuple):
    """The taxes to stay at or below: the gate has to be met, the goal is aimed at."""

    gate: float
    goal: float


@dataclass(frozen=True)
class Workload:
    """One call of the operator.

    bias: "alibi", "distance", or "factors" and "dense", each of the latter with "shared" where the batch shares it.
    rank: of the bias as the method's paper writes it; 0 for a dense bias. Distances are those of points in space.
    best: the peer with a bias that was fastest in an earlier measurement on an H200.
    tied: the batch is as large as the length, as in attention over the rows of a pair representation.
    """

    name: str
    title: str
    bias: str
    batch: int
    heads: int
    n_q: int
    n_k: int
    head_dim: int
    rank: int
    best: str
    causal: bool = False
    tied: bool = False
    targets: dict[str, Target] = field(default_factory=dict, hash=False)

    @property
    def modes(self) -> tuple[str, ...]:
        """Decoding has no way back."""
        return MODES if self.n_q > 1 else MODES[:1]

    @property
    def scores(self) -> int:
        """How many scores attention needs; what the causal mask excludes does not count."""
        pairs = self.n_q * self.n_k
        if self.causal:
            pairs -= self.n_q * (self.n_q - 1) // 2
        return self.batch * self.heads * pairs

    def at(self, length: int) -> Workload:
        """The same with another number of keys, and of queries where there are as many."""
        return replace(
            self,
            batch=length if self.tied else self.batch,
            n_q=length if self.n_q == self.n_k else self.n_q,
            n_k=length,
            targets={},
        )

    def small(self) -> Workload:
        """What a CPU does in a fraction of a second."""
        few = replace(self, batch=min(self.batch, 2), heads=min(self.heads, 2), tied=False)
        return few.at(min(self.n_k, 250 if self.n_k % 8 else 256))


WORKLOADS = (
    Workload(
        "gpt2-alibi", "GPT-2 with ALiBi, causal", "alibi", 1, 50, 16384, 16384, 32, 2, "cudnn-concat", causal=True,
        targets={"fwd": Target(0.92, 0.75), "fwdbwd": Target(1.10, 0.95)},
    ),
    Workload(
        "alibi-128", "ALiBi, causal, head dim 128", "alibi", 2, 16, 8192, 8192, 128, 2, "flex", causal=True,
        targets={"fwd": Target(1.25, 1.05), "fwdbwd": Target(1.40, 1.10)},
    ),
    Workload(
        "factors-32", "general factors, head dim 32", "factors", 2, 4, 16384, 16384, 32, 8, "cudnn-concat",
        targets={"fwd": Target(0.92, 0.78), "fwdbwd": Target(1.10, 0.95)},
    ),
    Workload(
        "factors-64", "general factors, head dim 64", "factors", 2, 16, 8192, 8192, 64, 16, "cudnn-concat",
        targets={"fwd": Target(1.11, 1.03), "fwdbwd": Target(1.30, 1.15)},
    ),
    Workload(
        "swin1-factors", "Swin stage 1, shared factors", "shared factors", 1024, 4, 576, 576, 32, 16, "flex",
        targets={"fwd": Target(0.72, 0.58), "fwdbwd": Target(1.10, 0.95)},
    ),
    Workload(
        "swin3-factors", "Swin stage 3, shared factors", "shared factors", 64, 16, 576, 576, 32, 16, "flex",
        targets={"fwd": Target(0.80, 0.62), "fwdbwd": Target(1.15, 1.00)},
    ),
    Workload(
        "swin1-dense", "Swin stage 1, exact shared dense", "shared dense", 1024, 4, 576, 576, 32, 0, "flex",
        targets={"fwd": Target(0.82, 0.62), "fwdbwd": Target(1.20, 1.05)},
    ),
    Workload(
        "pde-distance", "PDE solver, distances", "distance", 1, 8, 32186, 32186, 16, 5, "cudnn-concat",
        targets={"fwd": Target(0.90, 0.72), "fwdbwd": Target(1.03, 0.92)},
    ),
    Workload(
        "triangle-dense", "triangle, exact shared dense", "shared dense", 1218, 4, 1218, 1218, 32, 0, "flex", tied=True,
        targets={"fwd": Target(1.05, 0.88), "fwdbwd": Target(1.35, 1.15)},
    ),
    Workload(
        "triangle-factors", "triangle, shared factors", "shared factors", 1218, 4, 1218, 1218, 32, 96, "flex",
        tied=True, targets={"fwd": Target(1.10, 0.90), "fwdbwd": Target(1.40, 1.20)},
    ),
    Workload(
        "triangle-384", "triangle, exact shared dense, N 384", "shared dense", 384, 4, 384, 384, 32, 0, "flex",
        tied=True, targets={"fwd": Target(1.05, 0.88), "fwdbwd": Target(1.35, 1.15)},
    ),
    Workload(
        "decode-alibi", "decoding with ALiBi", "alibi", 32, 32, 1, 32768, 128, 2, "flex",
        targets={"fwd": Target(1.15, 1.00)},
    ),
)  # fmt: skip

BY_NAME = {workload.name: workload for workload in WORKLOADS}
