"""Time Protenix' triangle attention: the attention alone and the whole module, by every kernel that is installed.

    python -m flashbias.recipes.protenix.triangle --tokens 384 768 1218 2048

needs Protenix on the path, of which it uses nothing but the module (no weights, no other dependency of its than scipy).
Weights are random, bf16 as in the trunk; rows come in chunks of the size that Protenix chooses. In every row of the
result, `error` is the largest difference to the torch kernel in fp32, relative to its largest entry, over some rows.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .host import stand_ins

CHUNKS = {1024: None, 1536: 512, 2048: 256, 2560: 128}  # rows in a chunk up to so many tokens, as Protenix 2 has it
HEADS, HEAD_DIM, CHANNELS = 4, 32, 128
CHECKED_ROWS = 4


def chunk_size(tokens: int) -> int | None:
    """How many rows Protenix computes at a time, None for all."""
    return next((rows for limit, rows in CHUNKS.items() if tokens <= limit), 32)


def kernels(device: str) -> list[str]:
    """Names of Protenix' kernels that can run here, besides ours."""
    wanted = {"triattention": "triton", "cuequivariance": "cuequivariance_torch"} if device != "cpu" else {}
    return ["torch", *(name for name, package in wanted.items() if importlib.util.find_spec(package))]


def make_module(device: str, dtype: Any) -> Any:
    """A triangle attention of the base model, with weights that leave nothing at zero."""
    import torch

    with stand_ins():
        host = importlib.import_module("protenix.model.triangular.triangular")
    module = host.TriangleAttention(CHANNELS, HEAD_DIM, HEADS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)
    return module.to(device, dtype).eval()


def attention_steps(module: Any, x: Any, chunk: int | None, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Attention alone, from projected rows to `(rows, H, N, C)`, or with H and N exchanged; last, without a bias."""
    import torch.nn.functional as F

    from flashbias import DenseBias, biased_attention

    layers = importlib.import_module("protenix.model.triangular.layers")
    x = module.layer_norm(x)
    bias = module.linear(x).movedim(-1, -3)[None]
    no_mask = x.new_zeros(x.shape[0], 1, 1, x.shape[1])
    query, key, value = module.mha._prep_qkv(x, x, apply_scale=False)
    scale = HEAD_DIM**-0.5
    rows = [slice(i, i + (chunk or len(x))) for i in range(0, len(x), chunk or len(x))]
    stock = {
        "torch": lambda q, k, v, mask: layers._attention(q * scale, k, v, [mask, bias]),
        "triattention": lambda q, k, v, mask: layers._tri_attention(q * scale, k, v, [mask, bias]),
        "cuequivariance": lambda q, k, v, mask: layers.cuequivariance_triangular_attn(
            q, k, v, bias.float(), mask == 0, scale
        ),
    }

    def in_chunks(kernel: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: [kernel(query[part], key[part], value[part], no_mask[part]) for part in rows]

    return {
        **{name: in_chunks(stock[name]) for name in names},
        "flashbias": in_chunks(lambda q, k, v, mask: biased_attention(q, k, v, DenseBias(bias), scale=scale)),
        "flashbias, one chunk": lambda: [biased_attention(query, key, value, DenseBias(bias), scale=scale)],
        "no bias (wrong)": in_chunks(lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v)),
    }


def module_steps(module: Any, x: Any, chunk: int | None, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """The whole module, by the host's own forward with each kernel and by ours."""
    from flashbias.integrations.protenix.triangle import attention

    forward = getattr(module, "forward_before_flashbias", module.forward)

    def host(kernel: str) -> Callable[[], Any]:
        return lambda: [forward(x, None, chunk, kernel, inplace_safe=True)]

    return {
        **{name: host(name) for name in names},
        "flashbias": lambda: [attention(module, x, None, chunk, inplace_safe=True)],
        "flashbias, one chunk": lambda: [attention(module, x, None, None)],
    }


def measure(tokens: int, device: str, repeats: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each way, attention alone and module; `names` are those of Protenix' kernels."""
    import copy

    import torch

    from flashbias.recipes.bench.timing import time_all
    from flashbias.recipes.memory import peak_memory

    torch.manual_seed(tokens)
    module, chunk = make_module(device, torch.bfloat16), chunk_size(tokens)
    x = torch.randn(tokens, tokens, CHANNELS, device=device, dtype=torch.bfloat16)
    exact = copy.deepcopy(module).float()
    normed = exact.layer_norm(x.float())
    some = normed[:CHECKED_ROWS]
    bias = exact.linear(normed).movedim(-1, -3)[None]
    layers = importlib.import_module("protenix.model.triangular.layers")
    oracles = {
        "attention": layers._attention(*exact.mha._prep_qkv(some, some), [bias]),
        "module": exact.mha(some, some, [bias]),
    }
    del exact, normed, some, bias
    rows = []
    for part, make in (("attention", attention_steps), ("module", module_steps)):
        oracle, steps, checks = oracles[part], make(module, x, chunk, names), {}
        for name, step in list(steps.items()):
            try:
                made, memory = peak_memory(step, device)
            except Exception as failure:
                print(f"{tokens:6} {part:9} {name:22} failed: {type(failure).__name__}: {failure}"[:160])
                del steps[name]
                continue
            # Some kernels add a dimension in front, or exchange heads and positions.
            result = made[0].reshape(-1, *made[0].shape[-len(oracle.shape) + 1 :])[:CHECKED_ROWS].float()
            result = result if result.shape == oracle.shape else result.transpose(-2, -3)
            checks[name] = ((result - oracle).abs().max() / oracle.abs().max()).item(), memory
        for name, timing in time_all(steps, device, repeats, lambda name: None).items():
            error, memory = checks[name]
            figures = f"{timing.median:9.3f} ms   error {error:.1e}   {memory / 2**20:8.0f} MiB"
            print(f"{tokens:6} {part:9} {name:22} {figures}")
            rows.append(
                {"tokens": tokens, "part": part, "kernel": name, "chunk": chunk or tokens, "ms": timing.median,
                 "p20": timing.p20, "p80": timing.p80, "by": timing.by, "error": error, "peak_mib": memory / 2**20}
            )  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the CSV, number of tokens by number of tokens."""
    import torch

    from flashbias.recipes.machine import choose_device, write_rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[384, 768, 1218, 2048])
    parser.add_argument("--kernels", nargs="+", help="of Protenix; by default all that are installed")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which every kernel has its turn")
    parser.add_argument("--out", type=Path, default=Path("protenix_triangle.csv"))
    options = parser.parse_args(arguments)
    device = choose_device(options.device)
    names = options.kernels or kernels(device)
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        with torch.no_grad():
            rows += measure(tokens, device, options.repeats, names)
        write_rows(options.out, rows, device)


if __name__ == "__main__":
    main()
