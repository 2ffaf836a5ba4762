"""Time and memory of the model on car-like bodies: beside peers at one size, and alone from small to very large.

Every measurement has its check beside it. Weights of distances are drawn large enough to matter, of either sign.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashbias.recipes.memory import held_memory, peak_memory

from .model import CAR, Shape, Solver
from .rows import Rows
from .variants import EXACT, OURS, ROUNDED, Variant, load_kernel, rounded, variants

MODES = ("inference", "training")
PEERS = (OURS, "flex", "cudnn, joined", "cudnn, no bias (wrong)", "paper")
POINTS = (32186, 131072, 524288, 1048576)
WARM = 131072  # points: whatever is compiled for long inputs is compiled at this length
CHECKED = 64  # rows of attention
ENOUGH = 2.0  # seconds: what takes longer is timed once
ONCE = 10.0  # seconds: what takes longer is called once, all being compiled by then
FEW = 5
EPS = 2.0**-10  # of fp16: twice the error of an eager computation in fp16, and so much, is accurate
SUMS = 2.0**-16  # what sums over all points may lose in fp32


@dataclass
class Case:
    """A body with its features and targets, and the weights that every variant starts from."""

    shape: Shape
    points: Tensor
    features: Tensor
    targets: Tensor
    weights: dict[str, Tensor]

    def model(self, variant: Variant) -> nn.Module:
        """A fresh model."""
        model = Solver(self.shape, variant.prepare, variant.attend).to(self.points.device)
        model.load_state_dict(self.weights)
        return model

    def step(self, variant: Variant, mode: str) -> tuple[nn.Module, Callable[[], Any]]:
        """A model, and what is timed: inference, or an iteration of training with its optimizer."""
        model = self.model(variant)
        if mode == "inference":
            return model, torch.no_grad()(lambda: model(self.points, self.features))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)

        def iterate() -> None:
            self.loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()

        return model, iterate

    def loss(self, model: nn.Module) -> Tensor:
        """The mean square, as for the library's car design."""
        return (model(self.points, self.features) - self.targets).square().mean()

    def answers(self, variant: Variant, mode: str) -> list[Tensor]:
        """What is compared: the outputs, and in training all gradients instead."""
        model = self.model(variant)
        if mode == "inference":
            with torch.no_grad():
                return [model(self.points, self.features)]
        self.loss(model).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def case(points: int, layers: int, device: str, seed: int = 0) -> Case:
    """The car model on a body of so many points."""
    import numpy as np

    from .car_data import surface

    shape = replace(CAR, layers=layers)
    body, normal = surface(points, np.random.default_rng(seed))
    torch.manual_seed(seed)
    weights = Solver(shape, variants()[OURS].prepare, variants()[OURS].attend).state_dict()
    for name, weight in weights.items():
        if "pos_weight" in name:
            weight.normal_(std=0.1)
        elif weight.dim() > 1:
            weight.normal_(std=weight.shape[-1] ** -0.5)
    there = torch.from_numpy(body).float()[None]
    features = torch.cat((there, torch.zeros(1, points, 1), torch.from_numpy(normal).float()[None]), -1)
    targets = torch.sin(there @ torch.randn(3, shape.outputs))
    return Case(shape, there.to(device), features.to(device), targets.to(device), weights)


def compare(
    points: int, names: Sequence[str], modes: Sequence[str], repository: Path | None, layers: int, device: str,
    repeats: int, out: Path, say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """The model with each variant's attention; returns the rows, which are written as they come."""
    found = variants(None if repository is None else load_kernel(repository))
    problem = case(points, layers, device)
    rows = Rows(out / "car.csv", ("points", "layers", "mode", "variant", "device"), device)
    written = []
    exact = {mode: problem.answers(found[EXACT], mode) for mode in modes}
    least = {mode: _distance(problem.answers(found[ROUNDED], mode), exact[mode]) for mode in modes}
    # One by one: an error in somebody's kernel takes all that comes after it along.
    for name in names:
        for mode in modes:
            row = {"points": points, "layers": layers, "mode": mode, "variant": name, "status": "ok", "reason": ""}
            try:
                if name not in found or (found[name].cuda and not device.startswith("cuda")):
                    raise LookupError("no checkout is named" if name not in found else "needs a GPU")
                made = problem.answers(found[name], mode)
                error = _distance(made, exact[mode]) if len(made) == len(exact[mode]) else None
                row |= measure(problem, found[name], mode, device, repeats)
                accurate = error is not None and error <= 2 * least[mode] + EPS
                row |= {"error": error, "error_of_rounding": least[mode], "accurate": accurate}
                say(f"{name}, {mode}: {row['ms']:.2f} ms, {row['peak_gb']:.2f} GB, error {error}")
            except Exception as error:
                row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
                say(f"{name}, {mode}: {row['reason']}")
            rows.add(row)
            written.append(row)
            _forget(device)
    return written


def _distance(made: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Relative, in the 2-norm; the root mean square over several tensors, so that small ones count."""
    errors = [float((m.double() - e.double()).norm() / e.double().norm()) for m, e in zip(made, exact, strict=True)]
    return math.hypot(*errors) / len(errors) ** 0.5


def scale(
    points: Sequence[int], layers: Sequence[int], modes: Sequence[str], device: str, out: Path,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """The model with our attention, at every size; returns the rows, which are written as they come."""
    rows = Rows(out / "scale.csv", ("points", "layers", "mode", "device"), device)
    variant, written = variants()[OURS], []
    for mode in modes:
        for n, depth in ((n, depth) for n in points for depth in layers):
            row: dict[str, Any] = {"points": n, "layers": depth, "mode": mode, "status": "ok", "reason": ""}
            name = f"{n} points, {depth} layers, {mode}"
            try:
                case(min(n, WARM), 1, device).step(variant, mode)[1]()
                problem = case(n, depth, device)
                row |= check(problem, mode)
                say(f"{name}: error {row['error']:.2e}, {row['error_of_rounding']:.2e} by rounding; now the time")
                row |= measure(problem, variant, mode, device, FEW)
                row["limit_fraction"] = limit_fraction(rows_device(device), n, depth, mode, row["ms"] / 1e3)
                say(f"{name}: {row['ms']:.1f} ms, {row['peak_gb']:.2f} GB")
            except Exception as error:
                row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
                say(f"{name}: {row['reason']}")
            rows.add(row)
            written.append(row)
            problem = None  # type: ignore[assignment]
            _forget(device)
    return written


def measure(problem: Case, variant: Variant, mode: str, device: str, repeats: int) -> dict[str, Any]:
    """Milliseconds, their spread, and the memory that torch has allocated at most, in 10^9 bytes."""
    _, step = problem.step(variant, mode)
    held = held_memory(device) if device.startswith("cuda") else 0
    started = time.perf_counter()
    _, rise = peak_memory(step, device)
    first = time.perf_counter() - started
    times = [first] if first > ONCE else []
    times += () if times else _times(step, device, repeats if first < ENOUGH else 1)
    median = sorted(times)[len(times) // 2]
    memory = (held + rise) / 1e9
    return {
        "ms": median * 1e3,
        "fastest": min(times) * 1e3,
        "slowest": max(times) * 1e3,
        "calls": len(times),
        "peak_gb": memory,
    }


def _times(step: Callable[[], Any], device: str, repeats: int) -> Iterator[float]:
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        yield time.perf_counter() - started


def check(problem: Case, mode: str) -> dict[str, Any]:
    """The first layer's attention on some rows, or the gradients that these rows give, against float64.

    The way back is that of a loss of these rows: weights of keys and values gather its gradient from all points.
    Float64 in which what attention holds is rounded to its dtype is the measure.
    """
    from flashbias.integrations.neural_solver import attention

    model: Any = problem.model(variants()[OURS])
    layer = model.blocks[0].Attn
    with torch.no_grad():
        x = model.preprocess(torch.cat((problem.points, problem.features), -1)) + model.placeholder
        x = model.blocks[0].ln_1(x)
    layer.to_out = nn.Identity()  # what the heads put out
    rows = torch.linspace(0, x.shape[1] - 1, CHECKED, device=x.device).long()
    double, points = copy.deepcopy(layer).double(), problem.points.double()
    square = (points[:, rows, None] - points[:, None]).square().sum(-1)[:, None]

    def by_the_book(dtype: torch.dtype) -> Tensor:
        query, key, value, weight = double.projected(x.double())
        near = functools.partial(rounded, dtype=dtype)
        scores = near(near(query[:, :, rows]) @ near(key).mT) * layer.scale - weight[:, :, rows, None] * square
        return near(near(scores.softmax(-1)) @ near(value)).transpose(1, 2).flatten(2)

    def answers(layer: nn.Module, attend: Callable[[], Tensor]) -> Sequence[Tensor]:
        with torch.set_grad_enabled(mode == "training"):
            out = attend()
        if mode == "inference":
            return [out]
        direction = torch.arange(out.numel(), device=x.device, dtype=out.dtype).sin().view_as(out)
        return torch.autograd.grad(out, list(layer.parameters()), direction)

    dtype = attention.dtype_of(x, "auto")
    exact, near = (answers(double, functools.partial(by_the_book, kind)) for kind in (torch.float64, dtype))
    made = answers(layer, lambda: layer(x, model.prepare(problem.points))[:, rows])
    error, least = _distance(made, exact), _distance(near, exact)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "error": error,
        "error_of_rounding": least,
        "accurate": error <= 2 * least + max(4 * torch.finfo(dtype).eps, SUMS),
    }


def rows_device(device: str) -> str:
    """The name of the device."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def limit_fraction(name: str, points: int, layers: int, mode: str, seconds: float) -> float | None:
    """Of the scores that the chip can do at most, how many the attention of all layers did in the time of the model."""
    from flashbias.recipes.bench.limits import scores_per_second
    from flashbias.recipes.bench.workloads import BY_NAME

    workload = BY_NAME["pde-distance"].at(points)
    limit = scores_per_second(name, workload, "fwd" if mode == "inference" else "fwdbwd")
    return None if limit is None else layers * workload.scores / seconds / limit


def _forget(device: str) -> None:
    import gc

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
