"""`flashbias demo`: one trained SwinV2, evaluated with timm's own code and with the patch.

The images are the 1,797 handwritten digits that come with scikit-learn, enlarged from 8 x 8 to 64 x 64, a fifth of them
held out. The model has four windows of 8 x 8 patches in its first stage, the second block shifted. Training is stock.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flashbias import __version__
from flashbias.errors import FlashBiasError
from flashbias.patches import disabled

from .side_by_side import Measurement, side_by_side

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IMAGE_SIZE = 64
HELD_OUT = 0.2
BATCH = 32
LEARNING_RATE = 3e-3
REPEATS = 7
# Small tensors gain little from more threads, and where the cores are busy the threads wait for each other.
TRAINING_THREADS = 1
EVALUATION_THREADS = 4

# The same weights in fp32, summed in another order: logits of size 10 differ by about 1e-5, and no image changes sides
# unless two of its logits are as close as that.
LOGIT_TOLERANCE = 1e-3
IMAGE_TOLERANCE = 1


class DemoError(FlashBiasError, RuntimeError):
    """The demo cannot run here."""


def run(epochs: int, seed: int, device: str) -> int:
    """Train, evaluate twice, print; returns the exit code, 0 if both evaluations agree.

    Raises `DemoError` where something that the demo needs is missing.
    """
    from rich.console import Console

    device = _choose(device)
    chatter = Console(stderr=True)
    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "swin_v2.pt"
        train(path, epochs, seed, device, chatter)
        training = time.perf_counter() - started
        with chatter.status("evaluating with the code of timm and with the patch"):
            variants = {name: partial(prepare, path, device, name == "patched") for name in ("stock", "patched")}
            measured = side_by_side(variants, device, REPEATS)
    result = compare(measured["stock"], measured["patched"], digits()[3])
    result |= {"device": device, "epochs": epochs, "seed": seed, "training_seconds": round(training, 1)}
    result |= {"total_seconds": round(time.perf_counter() - started, 1), **_versions()}
    Console().print(_table(result, device))
    if not result["agree"]:
        chatter.print("[red]The two evaluations differ by more than rounding.")
    print(json.dumps({"recipe": "demo"} | result), flush=True)
    return 0 if result["agree"] else 1


def compare(stock: Measurement, patched: Measurement, labels: Tensor) -> dict[str, Any]:
    """The numbers of both evaluations side by side, and whether they agree. Results are logits `(images, classes)`."""
    import torch

    logits, ours = torch.tensor(stock.result), torch.tensor(patched.result)
    right = [int((entry.argmax(1) == labels).sum()) for entry in (logits, ours)]
    difference = (logits - ours).abs().max().item()
    agree = difference <= LOGIT_TOLERANCE and abs(right[0] - right[1]) <= IMAGE_TOLERANCE  # no NaN passes the first
    return {
        "agree": agree,
        "images": len(labels),
        "top1_stock": right[0] / len(labels),
        "top1_patched": right[1] / len(labels),
        "largest_logit": round(logits.abs().max().item(), 3),
        "largest_logit_difference": difference,
        "logit_tolerance": LOGIT_TOLERANCE,
        "seconds_stock": round(stock.seconds, 4),
        "seconds_patched": round(patched.seconds, 4),
        "peak_mib_stock": round(stock.peak / 2**20, 1),
        "peak_mib_patched": round(patched.peak / 2**20, 1),
    }


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


def prepare(path: Path, device: str, patched: bool) -> Callable[[], list[list[float]]]:
    """The trained model, ready to evaluate the held-out images in one batch; for a process that is new to timm."""
    import torch

    if patched:
        from flashbias.integrations import swin_v2  # before timm is imported: the patch waits for it
    torch.set_num_threads(min(EVALUATION_THREADS, torch.get_num_threads()))
    model = build_model()
    if patched and not swin_v2.is_applied():
        raise DemoError("timm without the patch", "a timm that can be patched", "see the warning above")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    model.eval().to(device)
    images = digits()[2].to(device)

    def logits() -> list[list[float]]:
        with torch.inference_mode():
            return model(images).tolist()

    with torch.inference_mode():
        model(images[:2])  # what is loaded, compiled or kept at a first call belongs to no measurement
    return logits


def _choose(device: str) -> str:
    if disabled():
        raise DemoError("FLASHBIAS_DISABLE is set", "a patch to compare with", "unset it")
    for name, extra in (("timm", "timm"), ("sklearn", "recipes")):
        if importlib.util.find_spec(name) is None:
            raise DemoError(f"no {name}", f"the extra [{extra}]", f"pip install 'flashbias[{extra}]'")
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise DemoError(f"--device {device}", "cpu, cuda or cuda:N", "choose one of these") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise DemoError(f"--device {device}, and torch sees no GPU", "a GPU", "use --device cpu")
    return device


def _versions() -> dict[str, str]:
    return {"flashbias": __version__} | {name: metadata.version(name) for name in ("torch", "timm")}


def _table(result: dict[str, Any], device: str) -> Any:
    from rich.table import Column, Table

    stock, patched = (Column(name, justify="right") for name in ("timm", "patched"))
    table = Table("", stock, patched, title=f"SwinV2, {result['images']} held-out digits, {device}, fp32")
    for label, key, form in (
        ("top-1", "top1", "{:.2%}"),
        ("time for a pass", "seconds", "{:.4f} s"),
        ("peak memory of a pass", "peak_mib", "{:.1f} MiB"),
    ):
        table.add_row(label, *(form.format(result[f"{key}_{who}"]) for who in ("stock", "patched")))
    difference = f"{result['largest_logit_difference']:.1e}"
    table.add_row(f"largest logit difference (of {result['largest_logit']:.1f})", "", difference)
    return table
