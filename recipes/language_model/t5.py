"""`flashbias language-model t5`: a T5 encoder in training, stock and patched, with random weights and no dropout."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashbias.errors import FlashBiasError

from .measuring import free, milliseconds, random_model, reason, row_store

LARGE = {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "vocab_size": 32128}
TINY = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
SIZES = {"t5-large": LARGE, "tiny-t5": TINY}
OURS, BOUND = "flashbias", "sdpa without bias (wrong)"
CHECKED = 512  # tokens at which outputs and gradients are compared with the stock model in fp32
REPEATS = 5
TABLE = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def run(size: str, lengths: Sequence[int], batch: int, compiled: bool, device: str, out: Path | None) -> int:
    """Measure and store, row by row; returns the exit code."""
    from flashbias.recipes import machine

    device = machine.choose_device(device)
    if size not in SIZES:
        raise FlashBiasError(f"--size {size}", "one of " + ", ".join(SIZES), "choose one of these")
    rows: list[dict[str, Any]] = []
    store = row_store("language_model_t5.csv", device, out, ("model", "batch", "compiled"))
    for row in measure(size, lengths, batch, compiled, device):
        store(row)
        print(
            f"{size:9} {row['attention']:26} {row['tokens']:6} {row['milliseconds'] or '-':>9} ms "
            f"{row['peak_mib'] or '-':>7} MiB {row['times_faster'] or '-':>5} {row['reason']}",
            flush=True,
        )
        rows.append(row)
    wrong = [row for row in rows if row["attention"] == OURS and row["accurate"] is not True]
    faster = {row["tokens"]: row["times_faster"] for row in rows if row["attention"] == OURS}
    print(json.dumps({"rows": len(rows), "wrong": len(wrong), "times_faster": faster}), flush=True)
    return 1 if wrong else 0


def measure(size: str, lengths: Sequence[int], batch: int, compiled: bool, device: str) -> Iterator[dict[str, Any]]:
    """A row for each attention and length; `times_faster` is over the fastest stock one."""
    model = make(size, device)
    try:
        errors = check(model, device)
    except Exception as failure:
        errors = {"error": "", "host_error": "", "fp32_error": "", "accurate": reason(failure)}
    free(device)
    base = {
        "model": size, "dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "batch": batch,
        "compiled": compiled, **errors,
    }  # fmt: skip
    stock = ["stock " + name for name in implementations(model)]
    for tokens in lengths:
        fastest = None
        for attention in (*stock, BOUND, OURS):
            row = base | {"attention": attention, "tokens": tokens, "milliseconds": "", "peak_mib": "",
                          "times_faster": "", "reason": ""}  # fmt: skip
            try:
                with as_asked(model, attention):
                    row |= step(model, tokens, batch, compiled, device)
            except Exception as failure:
                row["reason"] = reason(failure)
            elapsed = row["milliseconds"]
            if attention in stock and elapsed:
                fastest = min(elapsed, fastest or elapsed)
            elif fastest and elapsed:
                row["times_faster"] = round(fastest / elapsed, 2)
            yield row
            free(device)


def make(size: str, device: str) -> Any:
    """The encoder in training mode, bf16 on a GPU and fp32 on a CPU, with a position bias that matters."""
    import torch

    from flashbias.integrations._torchvision import make_importable

    make_importable()
    import transformers

    config = transformers.T5Config(dropout_rate=0.0, **SIZES[size])
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = random_model(transformers.T5EncoderModel, config, device, dtype)
    torch.nn.init.normal_(model.get_parameter(TABLE))
    return model.train()


def implementations(model: Any) -> list[str]:
    """The attentions that the host has: torch's SDPA, with the position bias as its dense mask, since 5.18."""
    return ["sdpa", "eager"] if type(model)._supports_sdpa else ["eager"]


@contextmanager
def as_asked(model: Any, attention: str) -> Iterator[None]:
    """Inside, the model runs the attention of that name."""
    import torch.nn.functional as F

    from flashbias.integrations import t5
    from flashbias.integrations.t5 import attention as layer

    def without_bias(query: Any, key: Any, value: Any, bias: Any, *, mask: Any, scale: float) -> Any:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    operator = layer.biased_attention
    (t5.revert if attention.startswith("stock") else t5.apply)()
    if attention == BOUND:
        layer.biased_attention = without_bias  # type: ignore[assignment]
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = attention.split()[-1] if attention.startswith("stock") else "eager"
    try:
        yield
    finally:
        layer.biased_attention = operator
        t5.revert()


def check(model: Any, device: str) -> dict[str, Any]:
    """Errors of the last hidden states and of the table's gradient, whichever is larger, relative to the host in fp32.

    Ours and the host's own in the model's dtype, and ours in fp32.
    """
    import torch

    exact = copy.deepcopy(model).float()
    host = "stock " + implementations(model)[0]
    ids = _ids(model, CHECKED, 1, device)
    oracle = _found(exact, host, ids)
    errors = {
        "error": _error(_found(model, OURS, ids), oracle),
        "host_error": _error(_found(model, host, ids), oracle),
        "fp32_error": _error(_found(exact, OURS, ids), oracle),
    }
    # In fp32 the host is the measure itself: both are rounded in each of many layers, forward and back.
    dtype = next(model.parameters()).dtype
    roundings = 64 if dtype == torch.float32 else 4
    bound = 2 * errors["host_error"] + roundings * torch.finfo(dtype).eps
    in_fp32 = 128 * len(model.encoder.block) * torch.finfo(torch.float32).eps
    return errors | {"accurate": errors["error"] <= bound and errors["fp32_error"] <= in_fp32}


def _found(model: Any, attention: str, ids: Any) -> list[Any]:
    import torch

    with as_asked(model, attention):
        out = model(input_ids=ids).last_hidden_state
        weights = torch.linspace(-50, 50, out.numel(), device=out.device).view_as(out).sin().to(out.dtype)
        (gradient,) = torch.autograd.grad((out * weights).float().mean(), model.get_parameter(TABLE))
    return [out.detach().float(), gradient.float()]


def _error(found: list[Any], oracle: list[Any]) -> float:
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, oracle, strict=True))


def step(model: Any, tokens: int, batch: int, compiled: bool, device: str) -> dict[str, Any]:
    """Median time and peak memory of a forward and a backward, without an optimizer, on full rows of tokens."""
    import torch

    from flashbias.recipes.memory import peak_memory

    ids = _ids(model, tokens, batch, device)
    runner = model
    if compiled:  # block by block would leave the position bias of the first one outside
        torch.compiler.reset()
        runner = torch.compile(model)

    def work() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        runner(input_ids=ids).last_hidden_state.float().square().mean().backward()

    work()
    memory = peak_memory(work, device)[1]
    times = sorted(milliseconds(work, device) for _ in range(REPEATS))
    return {"milliseconds": round(times[len(times) // 2], 3), "peak_mib": round(memory / 2**20)}


def _ids(model: Any, tokens: int, batch: int, device: str) -> Any:
    import torch

    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(2, model.config.vocab_size, (batch, tokens), generator=generator).to(device)
