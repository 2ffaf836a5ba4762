"""The tensors of a workload, the bias that they make in each form that a peer takes, and parts of both."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashbias import ALiBi, Bias, DenseBias, FactoredBias, SpatialDistance

from .workloads import Workload

# The dimensions of batch and heads; what is shared has size 1 there. All other tensors have them in front.
AXES: dict[str, tuple[int | None, int | None]] = {"slopes": (None, 0), "points": (None, None)}
DENSE_BLOCK = 2**27  # scores of a dense bias that are made at once, in fp32
ROW_ALIGNMENT = 16  # elements: rows of a dense bias start at multiples of it, as all its readers like best


class Refused(Exception):
    """A peer does not do this workload here. The message becomes the reason of its row."""


@dataclass(frozen=True)
class Ready:
    """A peer that is ready to compute.

    run: returns the output `(B, H, Nq, C)`.
    made: tensors that it made beforehand and keeps; they count as its memory.
    bias_gradient: whether the tensors of the bias get gradients. Peers that give none are timed with less work.
    """

    run: Callable[[], Tensor]
    made: tuple[Tensor, ...] = ()
    bias_gradient: bool = True


@dataclass
class Problem:
    """tensors: query, key, value and those of the bias by name. cotangent: of the output, in its shape."""

    workload: Workload
    tensors: dict[str, Tensor]
    cotangent: Tensor
    _dense: Tensor | None = field(default=None, repr=False)

    @classmethod
    def make(cls, workload: Workload, device: str, seed: int) -> Problem:
        """Random tensors, always the same for a seed: bf16 on a GPU, fp32 on a CPU."""
        w = workload
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        generator = torch.Generator(device).manual_seed(seed + zlib.crc32(w.name.encode()))

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device, generator=generator)

        shape_q, shape_k = (w.batch, w.heads, w.n_q, w.head_dim), (w.batch, w.heads, w.n_k, w.head_dim)
        tensors = {"query": normal(*shape_q), "key": normal(*shape_k), "value": normal(*shape_k)}
        kind, batch = w.bias.removeprefix("shared "), 1 if w.bias.startswith("shared") else w.batch
        if kind == "alibi":
            tensors["slopes"] = 2.0 ** (-8.0 * torch.arange(1, w.heads + 1, device=device) / w.heads)
        elif kind == "distance":  # weights of either sign, as a linear layer gives them
            tensors["points"] = 2 * torch.rand(1, w.n_q, 3, device=device, generator=generator)
            tensors["weight"] = normal(1, w.heads, w.n_q, dtype=torch.float32)
        elif kind == "factors":  # of a size that makes the bias one of variance 1
            tensors["q_factor"] = normal(batch, w.heads, w.n_q, w.rank) * w.rank**-0.25
            tensors["k_factor"] = normal(batch, w.heads, w.n_k, w.rank) * w.rank**-0.25
        else:
            tensors["values"] = normal(batch, w.heads, w.n_q, w.n_k)
        return cls(w, tensors, normal(*shape_q))

    @property
    def device(self) -> torch.device:
        return self.cotangent.device

    @property
    def scale(self) -> float:
        return self.workload.head_dim**-0.5

    @property
    def offset(self) -> int:
        """Of the causal diagonal, and of the positions of ALiBi."""
        return self.workload.n_k - self.workload.n_q

    def part(self, batches: slice, heads: slice) -> Problem:
        """Views of some batch rows and heads."""
        tensors = {name: tensor[place(name, tensor, batches, heads)] for name, tensor in self.tensors.items()}
        return Problem(self.workload, tensors, self.cotangent[batches, heads])

    def bias(self, tensors: dict[str, Tensor], rows: Tensor | None = None) -> Bias:
        """The bias of all queries, or of those in `rows`, made of tensors of this problem in any dtype."""
        if "slopes" in tensors:
            if rows is None:
                return ALiBi(tensors["slopes"])
            positions = torch.arange(self.workload.n_k, device=rows.device)
            return ALiBi(tensors["slopes"], q_positions=rows + self.offset, k_positions=positions)
        if "points" in tensors:
            points, weight = tensors["points"], tensors["weight"]
            if rows is None:
                return SpatialDistance(points, points, weight)
            return SpatialDistance(points[:, rows], points, weight[..., rows])
        if "values" in tensors:
            return DenseBias(tensors["values"] if rows is None else tensors["values"][..., rows, :])
        q_factor = tensors["q_factor"] if rows is None else tensors["q_factor"][..., rows, :]
        return FactoredBias(q_factor, tensors["k_factor"])

    def allowed(self, rows: Tensor) -> Tensor | None:
        """Where queries may attend under the causal mask, `(rows, Nk)`; None where there is no mask."""
        if not self.workload.causal:
            return None
        return torch.arange(self.workload.n_k, device=rows.device) <= rows[:, None] + self.offset

    def factors(self, tensors: dict[str, Tensor], unit: float = 1.0) -> tuple[Tensor, Tensor]:
        """Factors `(B or 1, H or 1, N, R)` in the dtype of the query whose product is the bias divided by `unit`.

        What is constant along a row is left out. Those of slopes and points, which are fp32, are split into high and
        low halves, four columns for each one, because with 16 bits alone positions beyond 256 are wrong.

        Raises `Refused` for a dense bias.
        """
        dtype = self.cotangent.dtype
        if "values" in tensors:
            raise Refused("a dense bias has no factors")
        if "q_factor" in tensors:
            return tensors["q_factor"] / unit, tensors["k_factor"]
        if "slopes" in tensors:
            positions = torch.arange(self.workload.n_k, dtype=torch.float32, device=self.device)
            q_factor = tensors["slopes"][None, :, None, None].expand(1, -1, self.workload.n_q, 1) / unit
            return _halves(q_factor, positions[None, None, :, None], dtype)
        points, weight = tensors["points"][:, None], tensors["weight"][..., None] / unit
        points = points - (points.amin(-2, keepdim=True) + points.amax(-2, keepdim=True)).detach() / 2
        q_factor = torch.cat((2 * weight * points, -weight), -1)
        return _halves(q_factor, torch.cat((points, points.square().sum(-1, keepdim=True)), -1), dtype)

    def dense(self) -> Tensor:
        """Bias and causal mask as one matrix `(B or 1, H, Nq, Nk)` in the dtype of the query, made once.

        Raises `Refused` where the matrix would not fit into memory.
        """
        if self._dense is None:
            w = self.workload
            leaves = {name: tensor for name, tensor in self.tensors.items() if name not in ("query", "key", "value")}
            batch = 1 if "slopes" in leaves or "points" in leaves else next(iter(leaves.values())).shape[0]
            width = -(-w.n_k // ROW_ALIGNMENT) * ROW_ALIGNMENT
            need_memory(batch * w.heads * w.n_q * width * self.cotangent.itemsize, "a dense bias", self.device)
            matrix = self.cotangent.new_empty((batch, w.heads, w.n_q, width))[..., : w.n_k]
            for b in range(batch):
                for h in range(w.heads):
                    part = self.part(slice(b, b + 1), slice(h, h + 1))
                    for rows in torch.arange(w.n_q, device=self.device).split(max(1, DENSE_BLOCK // w.n_k)):
                        block = part.bias(part.tensors, rows).dense(len(rows), w.n_k).view(len(rows), w.n_k)
                        allowed = self.allowed(rows)
                        matrix[b, h, rows] = (block if allowed is None else block.masked_fill(~allowed, -torch.inf)).to(
                            matrix.dtype
                        )
            self._dense = matrix
        return self._dense


def place(name: str, tensor: Tensor, batches: slice, heads: slice) -> tuple[slice, ...]:
    """Where batch rows and heads lie in a tensor of a problem, or in its gradient."""
    index = [slice(None)] * tensor.dim()
    for axis, chosen in zip(AXES.get(name, (0, 1)), (batches, heads), strict=True):
        if axis is not None and tensor.shape[axis] > 1:
            index[axis] = chosen
    return tuple(index)


def need_memory(size: int, what: str, device: torch.device) -> None:
    """Raise `Refused` where `size` bytes are more than 70 % of the memory that is free."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = 4 * 2**30
    if size > 0.7 * free:
        raise Refused(f"{what} needs {size / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free")


def _halves(q_factor: Tensor, k_factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors in fp32 as factors in `dtype`: in 16 bits (high, high, low, low) and (high, low, high, low)."""
    if dtype == torch.float32:
        return q_factor, k_factor
    q_high, k_high = q_factor.to(dtype), k_factor.to(dtype)
    q_low, k_low = (q_factor - q_high.float()).to(dtype), (k_factor - k_high.float()).to(dtype)
    return torch.cat((q_high, q_high, q_low, q_low), -1), torch.cat((k_high, k_low, k_high, k_low), -1)
