"""Whole runs of Protenix' model, in variants that differ in how attention is computed, with the same noise.

Stages are timed synchronised: the trunk, the diffusion (all samples), the confidence head. Whatever a variant gives is
compared with what another gives, sample by sample, without superposition: the noise and the rotations are the same.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .host import Host, ModelError

STAGES = {"trunk": "get_pairformer_output", "diffusion": "sample_diffusion", "confidence": "run_confidence_head"}
# The packages that Protenix' kernels of these names need.
PACKAGES = {"torch": "torch", "triattention": "triton", "cuequivariance": "cuequivariance_torch"}
OURS, NO_BIAS = "flashbias", "no bias (wrong)"

# What is around a stage while it runs.
Around = Callable[[str], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Variant:
    """How a run is computed.

    kernel: one of Protenix' for triangle attention, `OURS`, or `NO_BIAS`: the projections as ours has them, and torch's
    attention without any bias. dtype: of the autocast, "bf16" or "fp32" for none. chunk: rows of a triangle attention
    at a time, None for as many as Protenix chooses. tf32: whether Protenix may compute products of fp32 in tf32.
    """

    kernel: str
    dtype: str = "bf16"
    chunk: int | None = None
    tf32: bool = True


@dataclass(frozen=True)
class Size:
    """How much is computed: cycles of the trunk, steps of the diffusion, samples."""

    cycles: int = 3
    steps: int = 20
    samples: int = 5
    seed: int = 101


@dataclass
class Outcome:
    """What a run took, and gave: coordinates `(samples, atoms, 3)`, pLDDT `(samples, atoms)` up to 100, pTM
    `(samples,)`, the distogram's probabilities `(tokens, tokens, bins)`, on the CPU."""

    seconds: dict[str, float]
    peak_bytes: int
    coordinates: Any
    plddt: Any
    ptm: Any
    distogram: Any


def absent(kernel: str, device: str) -> str | None:
    """Why a kernel cannot run here, or None."""
    if kernel == "torch" or kernel not in PACKAGES:
        return None
    if device == "cpu":
        return "needs a GPU"
    return None if importlib.util.find_spec(PACKAGES[kernel]) else f"{PACKAGES[kernel]} is not installed"


def run(
    host: Host, features: dict[str, Any], variant: Variant, size: Size, device: str,
    around: Around = lambda stage: contextlib.nullcontext(),
) -> Outcome:  # fmt: skip
    """One inference. The features stay as they are."""
    import numpy
    import torch

    configs, model = host.configs, host.model
    configs.sample_diffusion.N_sample, configs.sample_diffusion.N_step = size.samples, size.steps
    configs.model.N_cycle = model.N_cycle = size.cycles
    features = _on(copy.deepcopy(features), device)
    random.seed(size.seed)
    numpy.random.seed(size.seed)
    torch.manual_seed(size.seed)
    distograms: list[Any] = []
    hook = model.distogram_head.register_forward_hook(lambda *args: distograms.append(args[-1].detach()))
    half = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=variant.dtype == "bf16")
    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with computed_by(variant, host, device), _timed(model, device, around) as seconds, torch.no_grad(), half:
            started = time.perf_counter()
            made = model(
                input_feature_dict=features,
                label_full_dict=None,
                label_dict=None,
                mode="inference",
                mc_dropout_apply_rate=0.0,
            )[0]
            _wait(device)
            seconds["total"] = time.perf_counter() - started
    finally:
        hook.remove()
    seconds["step"] = seconds["diffusion"] / size.steps
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    return Outcome(
        seconds,
        peak,
        made["coordinate"].float().cpu(),
        torch.stack([data["atom_plddt"].float().cpu() * 100 for data in made["full_data"]]).squeeze(1),
        torch.stack([summary["ptm"].float().cpu().reshape(()) for summary in made["summary_confidence"]]),
        distograms[0].float().softmax(-1).half().cpu(),
    )


def differences(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """How far two runs are apart.

    rmsd_mean, rmsd_max: of the coordinates, over samples, in ångström. plddt: mean over atoms, of 100. ptm: the
    largest. distogram: half of the sum over bins of the probabilities' differences, the mean over pairs, up to 1.
    """
    rmsd = (ours.coordinates - theirs.coordinates).double().square().sum(-1).mean(-1).sqrt()
    pairs = (ours.distogram.float() - theirs.distogram.float()).abs().sum(-1) / 2
    found = {
        "rmsd_mean": rmsd.mean(),
        "rmsd_max": rmsd.max(),
        "plddt": (ours.plddt - theirs.plddt).abs().mean(),
        "ptm": (ours.ptm - theirs.ptm).abs().max(),
        "distogram": pairs.mean(),
    }
    return {name: float(value) for name, value in found.items()}


@contextlib.contextmanager
def computed_by(variant: Variant, host: Host, device: str) -> Iterator[None]:
    """Inside, the model computes as the variant says; afterwards, as before."""
    import torch

    from flashbias.integrations import protenix as ours

    configs, matmul, cudnn = host.configs, torch.backends.cuda.matmul, torch.backends.cudnn
    patched = variant.kernel in (OURS, NO_BIAS)
    # Without tf32 too, cuEquivariance multiplies triangles less exactly than torch, with which that run is compared.
    default = patched and variant.tf32 and not absent("cuequivariance", device)
    stock = "cuequivariance" if default else "torch"
    name = stock if patched else variant.kernel
    before = ours.is_applied(), matmul.allow_tf32, cudnn.allow_tf32, configs.infer_setting.chunk_size_thresholds
    (ours.apply if patched else ours.revert)()
    if patched and not ours.is_applied():
        raise ModelError("a patch that is off by FLASHBIAS_DISABLE", "the patch on", "unset FLASHBIAS_DISABLE")
    matmul.allow_tf32 = cudnn.allow_tf32 = variant.tf32
    configs.triangle_attention = name
    configs.triangle_multiplicative = "cuequivariance" if name == "cuequivariance" else "torch"
    if variant.chunk is not None:
        configs.infer_setting.chunk_size_thresholds = {str(1 << 30): variant.chunk}
    try:
        with _without_bias() if variant.kernel == NO_BIAS else contextlib.nullcontext():
            yield
    finally:
        applied, matmul.allow_tf32, cudnn.allow_tf32, configs.infer_setting.chunk_size_thresholds = before
        configs.triangle_attention = configs.triangle_multiplicative = "torch"
        (ours.apply if applied else ours.revert)()


@contextlib.contextmanager
def _without_bias() -> Iterator[None]:
    """Inside, the replacements call torch's attention, which is given no bias."""
    import torch.nn.functional as F

    from flashbias.integrations.protenix import local, pair_bias, triangle

    def attention(query: Any, key: Any, value: Any, bias: Any, *, mask: Any = None, scale: float) -> Any:
        # Torch has no fused kernel for more than one batch dimension.
        q, k, v = (x.flatten(0, -4) if x.dim() > 4 else x for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).view(*query.shape[:-1], value.shape[-1])

    modules = triangle, pair_bias, local
    kept = [module.biased_attention for module in modules]
    for module in modules:
        vars(module).update(biased_attention=attention)
    try:
        yield
    finally:
        for module, operator in zip(modules, kept, strict=True):
            vars(module).update(biased_attention=operator)


@contextlib.contextmanager
def _timed(model: Any, device: str, around: Around) -> Iterator[dict[str, float]]:
    """Inside, the model's stages note the seconds that they take."""
    seconds = dict.fromkeys(STAGES, 0.0)

    def timed(stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            _wait(device)
            with around(stage):
                started = time.perf_counter()
                result = method(*args, **kwargs)
                _wait(device)
                seconds[stage] += time.perf_counter() - started
            return result

        return call

    for stage, name in STAGES.items():
        vars(model)[name] = timed(stage, getattr(model, name))
    try:
        yield seconds
    finally:
        for name in STAGES.values():
            del vars(model)[name]


def _wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def _on(features: Any, device: str) -> Any:
    if isinstance(features, dict):
        return {name: _on(value, device) for name, value in features.items()}
    return features.to(device)
