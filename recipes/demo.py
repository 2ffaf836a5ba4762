"""`flashbias demo`: one trained SwinV2, evaluated with timm's own code and with the patch; on a GPU, a large one too.

Writes the numbers as CSV, with what they were measured on in each row, and a picture beside them.
"""

from __future__ import annotations

import importlib.util
import json
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flashbias.errors import FlashBiasError
from flashbias.patches import disabled

from . import demo_base, machine
from .demo_digits import digits, look_inside, prepare, train
from .side_by_side import Measurement, SideBySide

if TYPE_CHECKING:
    from torch import Tensor

REPEATS = 7
# The same weights in fp32, summed in another order: logits of size 10 differ by about 1e-5, and no image changes sides
# unless two of its logits are as close as that.
LOGIT_TOLERANCE = 1e-3
IMAGE_TOLERANCE = 1


class DemoError(FlashBiasError, RuntimeError):
    """The demo cannot run here."""


def run(epochs: int, seed: int, device: str, out: Path, base: bool | None = None) -> int:
    """Train, evaluate twice, show; returns the exit code, 0 if both evaluations agree.

    `base`: measure SwinV2-B too; None: on a GPU. Raises `DemoError` where something that the demo needs is missing,
    `DeviceError` for a device that is not there.
    """
    from rich.console import Console

    from . import demo_picture

    _check()
    device = machine.choose_device(device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {out}, {error.strerror}", "a folder that can be written", "choose another") from error
    chatter, console = Console(stderr=True), Console()
    started = time.perf_counter()
    with TemporaryDirectory() as folder, ExitStack() as stack:
        large = None
        if base or (base is None and device.startswith("cuda")):
            large = stack.enter_context(demo_base.Contest(demo_base.Case(), device))
        path = Path(folder) / "swin_v2.pt"
        train(path, epochs, seed, device, chatter)
        training = time.perf_counter() - started
        variants = {name: partial(prepare, path, device, name == "patched") for name in ("stock", "patched")}
        small = stack.enter_context(SideBySide(variants, device))
        layers = look_inside(path, device)
        if large is not None:
            with chatter.status(f"compiling {large.case.model}"):
                large.wait()
        with chatter.status("evaluating with the code of timm and with the patch"):
            measured = small.measure(REPEATS)
        small.end()
        measuring = time.perf_counter() - started
        result = {"recipe": "demo"} | compare(measured["stock"], measured["patched"], digits()[3])
        result |= {"layers": [asdict(layer.choice) for layer in layers], "epochs": epochs, "seed": seed}
        result |= {"timm": machine.version("timm")} | machine.conditions(device)
        result |= {
            "training_seconds": round(training, 1),
            "evaluated_seconds": round(measuring, 1),
        }
        console.print(_comparison(result), _choices(result["layers"]))
        machine.write_rows(out / "demo.csv", _rows(result), device)
        demo_picture.draw_digits(out / "demo.png", result, layers)
        files = ["demo.csv", "demo.png"]
        if large is not None:
            with chatter.status(f"measuring {large.case.model}"):
                rows = large.rows(chatter)
            large.end()
            console.print(demo_base.table(rows, result["device"]))
            kept = large.notes["flashbias|eager"]
            console.print("layers:", *(f"{count} {choice}" for choice, count in kept.items()))
            machine.write_rows(out / "demo_base.csv", rows, device)
            demo_picture.draw_base(out / "demo_base.png", rows, result)
            files += ["demo_base.csv", "demo_base.png"]
            result |= {"base": rows, "base_layers": kept, "agree": result["agree"] and demo_base.agree(rows)}
    result |= {"files": [str(out / name) for name in files], "seconds": round(time.perf_counter() - started, 1)}
    console.print(f"Stored in {out.resolve()}: {', '.join(files)}.", soft_wrap=True)
    if not result["agree"]:
        chatter.print("[red]The evaluations differ by more than rounding.")
    print(json.dumps(result), flush=True)
    return 0 if result["agree"] else 1


def compare(stock: Measurement, patched: Measurement, labels: Tensor) -> dict[str, Any]:
    """The numbers of both evaluations side by side, and whether they agree. Logits are `(images, classes)`."""
    import torch

    logits, ours = (torch.as_tensor(entry.result) for entry in (stock, patched))
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


def _check() -> None:
    if disabled():
        raise DemoError("FLASHBIAS_DISABLE is set", "a patch to compare with", "unset it")
    for name, extra in (("timm", "timm"), ("sklearn", "recipes"), ("matplotlib", "recipes")):
        if importlib.util.find_spec(name) is None:
            raise DemoError(f"no {name}", f"the extra [{extra}]", f"pip install '.[{extra}]' in the clone")


def _rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """For each evaluation one row."""
    shared = ("images", "largest_logit", "largest_logit_difference", "logit_tolerance")
    return [
        {"variant": name, "dtype": "float32", "timm": result["timm"]}
        | {key: result[f"{key}_{who}"] for key in ("top1", "seconds", "peak_mib")}
        | {key: result[key] for key in shared}
        | {"accurate": result["agree"]}
        for name, who in (("timm", "stock"), ("flashbias", "patched"))
    ]


def _comparison(result: dict[str, Any]) -> Any:
    from rich.table import Column, Table

    stock, patched = (Column(name, justify="right") for name in ("timm", "patched"))
    title = f"SwinV2, {result['images']} held-out digits in one batch, {result['device']}, fp32"
    table = Table("", stock, patched, title=title)
    for label, key, form in (
        ("top-1", "top1", "{:.2%}"),
        (f"fastest of {REPEATS} passes", "seconds", "{:.4f} s"),
        ("peak memory of a pass", "peak_mib", "{:.1f} MiB"),
    ):
        table.add_row(label, *(form.format(result[f"{key}_{who}"]) for who in ("stock", "patched")))
    difference = f"{result['largest_logit_difference']:.1e}"
    table.add_row(f"largest logit difference (of {result['largest_logit']:.1f})", "", difference)
    return table


def _choices(layers: list[dict[str, Any]]) -> Any:
    """What each layer's bias is kept as, and why."""
    from rich.table import Table

    table = Table("layer", "bias", "why", title="What each layer chose")
    for layer in layers:
        kept = layer["bias"] if layer["rank"] is None else f"{layer['bias']}, rank {layer['rank']}"
        table.add_row(layer["layer"], kept, layer["reason"])
    return table
