"""A small SwinV2 and the images it learns to read, for `flashbias demo`.

The images are the 1,797 handwritten digits that come with scikit-learn, enlarged from 8 x 8 to 64 x 64, a fifth of them
held out. The model has four windows of 8 x 8 patches in its first stage, the second block shifted. Training is stock.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from flashbias.decompose import Decomposition
    from flashbias.integrations.choice import Choice

IMAGE_SIZE = 64
HELD_OUT = 0.2
BATCH = 32
LEARNING_RATE = 3e-3
# Small tensors gain little from more threads, and where the cores are busy the threads wait for each other.
TRAINING_THREADS = 1
EVALUATION_THREADS = 4


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images `(n, 1, 64, 64)` in [-1, 1] and labels: to train on, and held out (always the same)."""
    import torch
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # scikit-learn comes without types
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]  # likewise

    data = load_digits()
    train_rows, test_rows = train_test_split(
        range(len(data.target)), test_size=HELD_OUT, stratify=data.target, random_state=0
    )
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = torch.nn.functional.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    labels = torch.tensor(data.target)
    return images[train_rows], labels[train_rows], images[test_rows], labels[test_rows]


def build_model() -> torch.nn.Module:
    """A SwinV2 with two blocks in each of two stages."""
    from flashbias.integrations._torchvision import make_importable

    make_importable()
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return SwinTransformerV2(
        img_size=IMAGE_SIZE,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        embed_dim=32,
        mlp_ratio=2.0,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=8,
        drop_path_rate=0.0,
    )


def train(path: Path, epochs: int, seed: int, device: str, chatter: Any) -> None:
    """Train with the code that is there, and save the weights."""
    import torch
    from rich.progress import Progress

    torch.set_num_threads(TRAINING_THREADS)
    with chatter.status("loading timm and the images"):
        torch.manual_seed(seed)
        model = build_model().to(device)
        images, labels, *_ = (tensor.to(device) for tensor in digits())
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps)
    with Progress(console=chatter) as progress:
        task = progress.add_task("training with the code of timm", total=epochs * steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(images), device=device)[: steps * BATCH].split(BATCH):
                loss = torch.nn.functional.cross_entropy(model(images[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.advance(task)
            progress.update(task, description=f"training with the code of timm, loss {loss.item():.3f}")
    torch.save(model.state_dict(), path)


def prepare(path: Path, device: str, patched: bool) -> Callable[[], Any]:
    """The trained model, ready to evaluate the held-out images in one batch; for a process that is new to timm."""
    import torch

    torch.set_num_threads(min(EVALUATION_THREADS, torch.get_num_threads()))
    model = _load(path, device, patched)
    images = digits()[2].to(device)

    def logits() -> Any:
        with torch.inference_mode():
            return model(images).cpu().numpy()

    with torch.inference_mode():
        model(images[:2])  # what is loaded, compiled or kept at a first call belongs to no measurement
    return logits


@dataclass(frozen=True)
class Layer:
    """What is known of a layer's bias `(H, N, N)`.

    choice: what the integration keeps it as, and why. found: its factors, of the rank that is kept or else of 16.
    table: the bias itself, less its row means.
    """

    choice: Choice
    found: Decomposition
    table: Tensor


def look_inside(path: Path, device: str) -> list[Layer]:
    """The biases of the trained model; patches timm in this process."""
    import torch

    from flashbias import decompose
    from flashbias.integrations import swin_v2

    model = _load(path, device, patched=True)
    layers = []
    with torch.inference_mode():
        model(digits()[2][:2].to(device))
        for choice in swin_v2.choices(model):
            attention: Any = model.get_submodule(choice.layer)
            bias = swin_v2.dense_bias(attention)
            scale = attention.logit_scale.clamp(max=math.log(100)).exp().flatten()
            found = decompose.svd(bias, choice.rank or 16, scale=scale, head_dim=attention.dim // attention.num_heads)
            layers.append(Layer(choice, found, bias - bias.mean(-1, keepdim=True)))
    return layers


def _load(path: Path, device: str, patched: bool) -> torch.nn.Module:
    import torch

    model = build_model()
    if patched:
        from flashbias.integrations import swin_v2

        swin_v2.apply()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval().to(device)
