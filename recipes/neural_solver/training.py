"""Train the model on elasticity in several ways, from the same weights and in the same order of samples.

As the library's `run.py` does it: AdamW, cosine annealing, the loss being relative L2 of stresses in their units.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashbias.recipes.memory import held_memory, peak_memory

from .elasticity_data import DataError, files
from .model import Shape, Solver, host_model
from .rows import Rows, like_the_last
from .variants import OURS, variants

STOCK, PATCHED = "library, stock", "library, patched"
SETTINGS = ("layers", "hidden", "points", "train", "test", "batch", "epochs", "seed", "device")
DEFAULT = ("exact fp32", "half factors", OURS)


@dataclass(frozen=True)
class Plan:
    """train, test: samples; checkout: of the library, for the variants of its own model."""

    data: Path
    shape: Shape
    train: int = 500
    test: int = 100
    epochs: int = 20
    batch: int = 4
    rate: float = 1e-3
    decay: float = 1e-5
    seed: int = 0
    checkout: Path | None = None


@dataclass
class Plates:
    """Coordinates `(S, P, 2)` and stresses `(S, P, 1)` on the device, and mean and deviation of the latter."""

    points: Tensor
    stresses: Tensor
    mean: Tensor
    deviation: Tensor

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Points and stresses, batch by batch."""
        order = torch.arange(len(self.points)) if order is None else order
        for some in order.split(size):
            yield self.points[some], self.stresses[some]

    def decode(self, out: Tensor) -> Tensor:
        """What a model puts out, in the units of stresses."""
        return out * self.deviation + self.mean


def load(plan: Plan, device: str) -> tuple[Plates, Plates]:
    """Training and test samples: the first and the last of the files, as the library takes them.

    Raises `DataError` where there are too few.
    """
    import numpy as np

    paths = files(plan.data)
    if not all(path.exists() for path in paths):
        raise DataError(f"no {paths[0]}", "data", "make some with flashbias neural-solver elasticity-data")
    points = torch.from_numpy(np.load(paths[0])).float().permute(2, 0, 1)
    stresses = torch.from_numpy(np.load(paths[1])).float().T[..., None]
    if len(points) < plan.train + plan.test:
        raise DataError(f"{len(points)} samples", f"{plan.train + plan.test}", "name fewer, or make more")
    parts = (slice(plan.train), slice(len(points) - plan.test, None))
    norm = stresses[parts[0]].mean().to(device), stresses[parts[0]].std().to(device)
    train, test = (Plates(points[part].contiguous().to(device), stresses[part].to(device), *norm) for part in parts)
    return train, test


def relative_l2(out: Tensor, wanted: Tensor) -> Tensor:
    """Summed over samples."""
    return ((out - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).sum()


def initial_weights(plan: Plan) -> dict[str, Tensor]:
    """The weights from which all variants start."""
    torch.manual_seed(plan.seed)
    found = variants()[OURS]
    return Solver(plan.shape, found.prepare, found.attend).state_dict()


@contextmanager
def made(name: str, plan: Plan, device: str) -> Iterator[nn.Module]:
    """The model of a variant with the initial weights, and the library patched or not while it is used."""
    from flashbias.integrations import neural_solver

    if name in (STOCK, PATCHED):
        assert plan.checkout is not None
        model = host_model(neural_solver.find(plan.checkout), plan.shape)
        switch = neural_solver.revert if name == STOCK else neural_solver.apply
        switch()
    else:
        found = variants()[name]
        model = Solver(plan.shape, found.prepare, found.attend)
    model.load_state_dict(initial_weights(plan))
    yield model.to(device)


def train(name: str, plan: Plan, device: str, rows: Rows, say: Callable[[str], None]) -> None:
    """Train one variant, a row for each epoch."""
    plates, others = load(plan, device)
    with made(name, plan, device) as model:
        optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, weight_decay=plan.decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=plan.epochs)
        shuffle = torch.Generator().manual_seed(plan.seed)

        def step(points: Tensor, stresses: Tensor) -> Tensor:
            loss = relative_l2(plates.decode(model(points, None)), stresses)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        for epoch in range(plan.epochs):
            batches = list(plates.batches(plan.batch, torch.randperm(plan.train, generator=shuffle)))
            losses: list[Tensor] = []
            memory = None
            if epoch == 0:  # what is compiled at a first call belongs to no measurement
                loss, memory = _first(step, batches.pop(0), device)
                losses.append(loss)
            _wait(device)
            started = time.perf_counter()
            losses += [step(*batch) for batch in batches]
            _wait(device)
            seconds = (time.perf_counter() - started) / max(1, len(batches))
            scheduler.step()
            error = evaluate(model, others, plan.batch)
            mean = float(torch.stack(losses).sum()) / plan.train
            rows.add(
                {"variant": name, "layers": plan.shape.layers, "hidden": plan.shape.hidden,
                 "points": plates.points.shape[1], "train": plan.train, "test": plan.test, "batch": plan.batch,
                 "epochs": plan.epochs, "seed": plan.seed, "epoch": epoch + 1, "train_loss": mean,
                 "relative_l2": error, "ms_per_iteration": seconds * 1e3, "peak_gb": memory}
            )  # fmt: skip
            say(f"{name}, epoch {epoch + 1}: loss {mean:.4f}, relative L2 {error:.4f}, {seconds * 1e3:.1f} ms")


def _first(step: Callable[..., Tensor], batch: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, float]:
    """The loss, and the memory in 10^9 bytes: all that is allocated on a GPU, the rise on a CPU."""
    before = held_memory(device) if device.startswith("cuda") else 0
    loss, rise = peak_memory(lambda: step(*batch), device)
    return loss, (before + rise) / 1e9


def evaluate(model: nn.Module, plates: Plates, batch: int) -> float:
    """Mean relative L2."""
    model.eval()
    with torch.no_grad():
        errors = [relative_l2(plates.decode(model(x, None)), y) for x, y in plates.batches(batch)]
    model.train()
    return float(torch.stack(errors).sum()) / len(plates.points)


def run(plan: Plan, names: Sequence[str], device: str, out: Path, say: Callable[[str], None]) -> list[str]:
    """Train all; returns why some could not be."""
    rows = Rows(out / "elasticity.csv", ("variant", "epoch", *SETTINGS), device)
    failures = []
    for name in names:
        try:
            train(name, plan, device, rows, say)
        except Exception as error:  # the others go on
            failures.append(f"{name}: {type(error).__name__}: {error}")
            say(failures[-1])
    return failures


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def summary(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """For each variant of the latest settings its last relative L2, the median time and the memory."""
    rows, found = like_the_last(rows, SETTINGS), []
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = sorted((row for row in rows if row["variant"] == name), key=lambda row: int(row["epoch"]))
        times = sorted(float(row["ms_per_iteration"]) for row in own)
        memory = next((float(row["peak_gb"]) for row in own if row["peak_gb"]), None)
        last = own[-1]
        errors = {column: float(last[column]) for column in ("relative_l2", "train_loss")}
        found.append(
            {"variant": name, "epochs": int(last["epoch"])} | errors | {"ms": times[len(times) // 2], "peak_gb": memory}
        )
    return found
