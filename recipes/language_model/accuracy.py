"""`flashbias language-model accuracy`: the same training by torch's attention and by ours, and what rounding costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAME = 0.02  # by which mean losses of the last tenth of the training may differ: that of another seed is larger
TIMES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Size:
    layers: int
    channels: int
    heads: int
    length: int
    batch: int
    steps: int
    windows: int  # of the longest length, of held-out text


ON_GPU = Size(layers=4, channels=256, heads=8, length=512, batch=32, steps=600, windows=16)
ON_CPU = Size(layers=2, channels=64, heads=4, length=64, batch=8, steps=60, windows=2)


def run(text: Path | None, steps: int | None, seed: int, device: str, out: Path | None) -> int:
    """Train, evaluate, store, draw; returns the exit code."""
    import torch

    from flashbias.recipes import machine

    from .gpt import GPT, WAYS, corpus

    device = machine.choose_device(device)
    size = ON_GPU if device.startswith("cuda") else ON_CPU
    folder = out or Path("recipes", "results", machine.folder_name(device))
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = (part.to(device).long() for part in corpus(text))
    losses: list[dict[str, Any]] = []
    perplexities: list[dict[str, Any]] = []
    for way in WAYS:
        torch.manual_seed(seed)
        model = GPT(size.layers, size.channels, size.heads).to(device)
        losses += [
            {"way": way, "step": step, "loss": loss}
            for step, loss in enumerate(_train(model, way, train, size, steps or size.steps, seed, device))
        ]
        perplexities += [
            {"way": way, "times": times, "length": times * size.length, "perplexity": perplexity}
            for times, perplexity in _evaluate(model, way, held_out, size, device)
        ]
        print(way, *(f"{row['length']}: {row['perplexity']:.3f}" for row in perplexities[-len(TIMES) :]))
        # Now: a run that is stopped leaves what it has found.
        machine.write_rows(folder / "language_model_loss.csv", losses, device)
        machine.write_rows(folder / "language_model_perplexity.csv", perplexities, device)
    draw(folder / "language_model.png", losses, perplexities)
    means = {way: _mean_of_last(losses, way) for way in WAYS}
    difference = abs(means["torch"] - means["flashbias"])
    print(json.dumps({"loss": means, "difference": difference, "same": difference <= SAME}), flush=True)
    return 0 if difference <= SAME else 1


def _train(model: Any, way: str, data: Any, size: Size, steps: int, seed: int, device: str) -> list[float]:
    import torch
    import torch.nn.functional as F

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(data) - size.length - 1, (size.batch,), generator=generator).to(device)
        window = data[starts[:, None] + torch.arange(size.length + 1, device=device)]
        with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
            logits = model(window[:, :-1], way)
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def _evaluate(model: Any, way: str, data: Any, size: Size, device: str) -> list[tuple[int, float]]:
    """Perplexity of the same held-out bytes, in windows of each length."""
    import torch
    import torch.nn.functional as F

    whole = size.windows * TIMES[-1] * size.length
    data = data[: whole + 1]
    found = []
    for times in TIMES:
        length = times * size.length
        count = (len(data) - 1) // length
        inputs, targets = (part[: count * length].view(count, length) for part in (data[:-1], data[1:]))
        total = 0.0
        with torch.no_grad(), torch.autocast(device.partition(":")[0], torch.bfloat16, enabled="cuda" in device):
            for some, wanted in zip(inputs.split(8), targets.split(8), strict=True):
                logits = model(some, way).float()
                total += F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
        found.append((times, float(torch.tensor(total / (count * length)).exp())))
    return found


def _mean_of_last(losses: Sequence[dict[str, Any]], way: str) -> float:
    own = [row["loss"] for row in losses if row["way"] == way]
    last = own[-max(1, len(own) // 10) :]
    return sum(last) / len(last)


def draw(path: Path, losses: Sequence[dict[str, Any]], perplexities: Sequence[dict[str, Any]]) -> None:
    """Loss over steps, and perplexity over the length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, way in enumerate(dict.fromkeys(row["way"] for row in losses)):
        own = [row for row in losses if row["way"] == way]
        style = {"lw": 3 - 0.6 * i, "alpha": 0.8, "label": way}
        left.plot([row["step"] for row in own], [row["loss"] for row in own], **style)
        own = [row for row in perplexities if row["way"] == way]
        right.plot([row["length"] for row in own], [row["perplexity"] for row in own], marker="o", **style)
    left.set(xlabel="step", ylabel="loss, nats per byte", title="training")
    right.set(xlabel="length", ylabel="perplexity per byte", title="held-out text, from the length of training on")
    right.set_xscale("log", base=2)
    left.legend(frameon=False)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
