"""SwinV2-B at 384 px, stock and patched, beside what else can be done to its attention; meant for a GPU.

Inference in fp16 autocast, eager and compiled block by block, each variant in a process of its own, measured in turn.
The weights are drawn, not trained, with a structure in the biases that a fresh model lacks. All are compared with the
stock model in fp32. A variant counts as accurate if its error is no more than twice the stock model's own in fp16, and
for the patch the tolerance with which it chooses factors. 'No bias' leaves out the mask too: it is wrong, and a bound.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from . import machine
from .side_by_side import Measurement, Noted, SideBySide

if TYPE_CHECKING:
    import torch

REPEATS = 3
SEED = 0
# How the attention is computed, and what `swin_peers` calls it.
PEERS = {"SDPA, kept bias": "dense", "SDPA, no bias": "no bias"}
REFERENCE = "timm, fp32"


@dataclass(frozen=True)
class Case:
    """A model of timm's, with other options than its own if need be, and how many images it sees at a time."""

    model: str = "swinv2_base_window12to24_192to384"
    batch: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)
    compiled: bool = True


class Contest(SideBySide):
    """All variants of a case, preparing in processes of their own: compilation takes most of the time."""

    def __init__(self, case: Case, device: str) -> None:
        modes = {"eager": False} | ({"compiled": True} if case.compiled else {})
        variants: dict[str, Callable[[], Any]] = {
            f"{name}|{mode}": partial(prepare, case, device, name, compiled)
            for mode, compiled in modes.items()
            for name in ("timm", *PEERS, "flashbias")
        }
        variants[f"{REFERENCE}|eager"] = partial(prepare, case, device, REFERENCE, False)
        self.case = case
        self.failures: dict[str, Exception] = {}
        super().__init__(variants, device, self.failures)

    def rows(self, console: Any) -> list[dict[str, Any]]:
        """A row for each variant that could be measured; why others could not is said on the console.

        Raises what the stock model raises: there is nothing to compare with then.
        """
        measured = self.measure(REPEATS)
        for name, error in self.failures.items():
            if name in (f"{REFERENCE}|eager", "timm|eager"):
                raise error
            reason = f"{name.replace('|', ', ')} failed: {type(error).__name__}: {error}"
            console.print(reason, style="red", markup=False)
        return rows(self.case, measured)


def rows(case: Case, measured: Mapping[str, Measurement]) -> list[dict[str, Any]]:
    """What was measured, judged. Results are logits `(images, classes)`."""
    from flashbias.integrations.choice import Settings

    reference = measured[f"{REFERENCE}|eager"].result
    scale = float(abs(reference).max())
    errors = {name: float(abs(entry.result - reference).max()) / scale for name, entry in measured.items()}
    allowed = 2 * errors["timm|eager"]
    tolerance = Settings().tolerance
    return [
        {
            "model": case.model,
            "batch": case.batch,
            "dtype": "float32" if name.startswith(REFERENCE) else "float16 autocast",
            "variant": name.partition("|")[0],
            "mode": name.partition("|")[2],
            "milliseconds": round(entry.seconds * 1e3, 3),
            "peak_gib": round((entry.held + entry.peak) / 2**30, 3),
            "relative_logit_error": float(f"{errors[name]:.3g}"),
            "same_top1": float((entry.result.argmax(1) == reference.argmax(1)).mean()),
            # NaN is not
            "accurate": errors[name] <= allowed + (tolerance if name.startswith("flashbias") else 0),
        }
        for name, entry in measured.items()
    ]


def agree(rows: list[dict[str, Any]]) -> bool:
    """Whether the patched model was measured, and is accurate wherever it was."""
    ours = [row["accurate"] for row in rows if row["variant"] == "flashbias"]
    return bool(ours) and all(ours)


def table(rows: list[dict[str, Any]], device: str) -> Any:
    """For the terminal."""
    from rich.table import Column, Table

    numbers = ("ms", "peak memory, GiB", "logit error", "same top-1")
    title = f"{rows[0]['model']}, batch {rows[0]['batch']}, {rows[0]['dtype']}, {device}"
    table = Table("mode", "attention", *(Column(name, justify="right") for name in numbers), title=title)
    for row in rows:
        mark = "" if row["accurate"] else "[red]"
        cells = (f"{row['milliseconds']:.1f}", f"{row['peak_gib']:.2f}", f"{row['relative_logit_error']:.1e}")
        table.add_row(row["mode"], row["variant"], *cells, f"{mark}{row['same_top1']:.1%}")
    return table


def prepare(case: Case, device: str, variant: str, compiled: bool) -> Callable[[], Any]:
    """The model, ready to compute logits; for a process that is new to timm. Its notes say what biases are kept as."""
    # As many variants are compiled at a time, each by processes of its own: by default as many as there are cores.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, machine.cores() // (2 + len(PEERS)))))
    import torch

    from .swin_peers import replace_attention

    torch.backends.cudnn.allow_tf32 = False
    model, images = _build(case, device, variant == "flashbias")
    if variant in PEERS:
        replace_attention(model, PEERS[variant], torch.float16)
    if compiled:
        # Block by block: those of the same shapes share what is compiled, and the whole would take minutes.
        for block in (module for module in model.modules() if hasattr(module, "shift_size")):
            block.compile(dynamic=False)
    backends = torch.nn.attention.SDPBackend
    fastest_first = [getattr(backends, f"{name}_ATTENTION") for name in ("CUDNN", "FLASH", "EFFICIENT")]
    kind, half = torch.device(device).type, variant != REFERENCE

    @torch.inference_mode()
    def logits() -> Any:
        with (
            torch.autocast(kind, torch.float16, enabled=half),
            torch.nn.attention.sdpa_kernel([*fastest_first, backends.MATH], set_priority=True),
        ):
            return model(images).float().cpu().numpy()

    logits()  # what is compiled or kept at a first call belongs to no measurement
    return Noted(logits, _choices(model)) if variant == "flashbias" else logits


def _choices(model: torch.nn.Module) -> dict[str, int]:
    """What biases are kept as and why, and in how many layers."""
    from flashbias.integrations import swin_v2

    found = swin_v2.choices(model)
    return dict(Counter(f"{c.bias}{f', rank {c.rank}' if c.bias == 'factored' else ''} ({c.reason})" for c in found))


def _build(case: Case, device: str, patched: bool) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model, and images for it: always the same."""
    import torch

    from flashbias.integrations._torchvision import make_importable

    make_importable()
    import timm

    if patched:
        from flashbias.integrations import swin_v2

        swin_v2.apply()
    torch.manual_seed(SEED)
    with torch.device(device):  # there weights are drawn much faster, where it is a GPU
        # Paths are dropped in training only, but by another number in each block: a compiler would see other blocks.
        model: Any = timm.create_model(case.model, pretrained=False, drop_path_rate=0.0, **case.options)
        images = torch.randn(case.batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
        return give_structure(model).eval(), images


def give_structure(model: torch.nn.Module) -> torch.nn.Module:
    """Draw all weights anew: those of a fresh model leave every bias constant and every block without effect."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cpb_mlp" in name:
                parameter.normal_(std=0.3 if "cpb_mlp.2" in name else 1.0)
            elif "logit_scale" in name:
                parameter.copy_(torch.linspace(3, 20, len(parameter)).log().view_as(parameter))
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.5)
    return model
