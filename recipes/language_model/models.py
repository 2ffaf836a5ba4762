"""`flashbias language-model models`: whole models of transformers, stock and patched, with random weights."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from .measuring import choose, free, milliseconds, random_model, reason, row_store

BLOOM = {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880}
MPT = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432, "max_seq_len": 65536}
FALCON = {
    "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "vocab_size": 50304, "alibi": True,
    "multi_query": False, "parallel_attn": False, "new_decoder_architecture": False, "bias": True,
}  # fmt: skip
SMALL = {"vocab_size": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom-560m": ("Bloom", BLOOM),
    "falcon-rw-1b": ("Falcon", FALCON),
    "mpt-7b": ("Mpt", MPT),
    "tiny-bloom": ("Bloom", SMALL | {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "tiny-falcon": ("Falcon", FALCON | SMALL | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "tiny-mpt": ("Mpt", SMALL | {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 4096}),
}
ATTENTIONS = ("flashbias", "sdpa without bias (wrong)", "stock")
# For decoding too: torch prefers cuDNN, for which each number of keys is a case of its own.
NO_CUDNN = "sdpa without bias or cuDNN (wrong)"
CHECKED = 1024  # tokens at which outputs are compared with the stock model in fp32
DECODED = 16
REPEATS, MOST = 3, 60  # of what is timed, at least and, where it is short and no cache grows, at most
ENOUGH = 300  # milliseconds
TURN = 3  # times, one after the other


def run(
    names: Sequence[str], lengths: Sequence[int], decode: int, path: Path | None, device: str, out: Path | None
) -> int:
    """Measure and store, row by row; returns the exit code."""
    from flashbias.recipes import machine

    device = machine.choose_device(device)
    names = choose(names, list(MODELS), path)
    rows: list[dict[str, Any]] = []
    store = row_store("language_model_models.csv", device, out)
    for name in names:
        for row in measure(name, lengths, decode, path, device):
            store(row)
            figures = f"{row['milliseconds'] or '-':>9} ms {row['peak_mib'] or '-':>9} MiB {row['tokens_per_second']}"
            place = f"{name:13} {row['work']:7} {row['attention']:34} {row['tokens']:6}"
            print(place, figures, row["reason"], flush=True)
            rows.append(row)
    wrong = [row for row in rows if row["attention"] in ("flashbias", "") and row["accurate"] is not True]
    print(json.dumps({"rows": len(rows), "wrong": len(wrong)}), flush=True)
    return 1 if wrong else 0


def measure(name: str, lengths: Sequence[int], decode: int, path: Path | None, device: str) -> Iterator[dict[str, Any]]:
    """A row for each attention and length, and for decoding; what fails has its reason in its row."""
    base = {"model": name, "dtype": "", "error": "", "host_error": "", "accurate": ""}
    try:
        model = make(name, path, device)
        base["dtype"] = str(model.dtype).removeprefix("torch.")
        base |= check(model, device)
    except Exception as failure:
        yield base | _empty_row("check", "", CHECKED) | {"reason": reason(failure)}
        return
    free(device)
    full: set[str] = set()
    for tokens in lengths:
        for row in prefills(model, tokens, device, full):
            full |= {row["attention"]} if "OutOfMemory" in row["reason"] else set()
            yield base | row
    for row in decodings(model, decode, device) if decode else ():
        yield base | row
    free(device)


def _row(work: str, attention: str, tokens: int, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why it was not."""
    row = _empty_row(work, attention, tokens)
    try:
        return row | measured()
    except Exception as failure:
        return row | {"reason": reason(failure)}


def _empty_row(work: str, attention: str, tokens: int) -> dict[str, Any]:
    figures = dict.fromkeys(("milliseconds", "peak_mib", "tokens_per_second", "reason"), "")
    return {"work": work, "attention": attention, "tokens": tokens, **figures}


def make(name: str, path: Path | None, device: str) -> Any:
    """The model in evaluation, bf16 on a GPU and fp32 on a CPU; Falcon by its SDPA path, which has ALiBi once."""
    import torch

    from flashbias.integrations._torchvision import make_importable

    make_importable()
    import transformers

    kind, options = MODELS[name]
    attention = "sdpa" if kind == "Falcon" else "eager"
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    cls = getattr(transformers, f"{kind}ForCausalLM")
    if path is not None:
        return cls.from_pretrained(path, dtype=dtype, attn_implementation=attention).to(device).eval()
    config = getattr(transformers, f"{kind}Config")(**options)
    config._attn_implementation = attention
    return random_model(cls, config, device, dtype).eval()


@contextmanager
def as_asked(attention: str) -> Iterator[None]:
    """Inside, models run the attention of that name."""
    import torch
    import torch.nn.functional as F

    from flashbias.integrations import alibi
    from flashbias.integrations.alibi.positions import Positions

    def without_bias(self: Any, query: Any, key: Any, value: Any, scale: float, bias: Any = None) -> Any:
        shape = query.shape
        if query.dim() > 4:  # Falcon's heads are a batch; torch's fused kernels take four dimensions
            query, key, value = (part.flatten(1, -3) for part in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=self.n_q > 1, scale=scale)
        return out.view(shape)

    attend, cudnn = Positions.attend, torch.backends.cuda.cudnn_sdp_enabled()
    (alibi.revert if attention == "stock" else alibi.apply)()
    if attention.startswith("sdpa"):
        Positions.attend = without_bias  # type: ignore[method-assign]
    if attention == NO_CUDNN:
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        Positions.attend = attend  # type: ignore[method-assign]
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        alibi.revert()


def check(model: Any, device: str) -> dict[str, Any]:
    """Errors of the last hidden states at `CHECKED` tokens, ours and the host's, relative to the host in fp32."""
    import copy

    import torch

    n = min(CHECKED, getattr(model.config, "max_seq_len", CHECKED))
    ids = _ids(model, n, device)
    found = {}
    with torch.no_grad():
        for attention in ("flashbias", "stock"):
            with as_asked(attention):
                found[attention] = model.base_model(ids, use_cache=False).last_hidden_state.float()
        exact = copy.deepcopy(model.base_model).float()
        with as_asked("stock"):
            oracle = exact(ids, use_cache=False).last_hidden_state
    del exact
    free(device)
    size = oracle.abs().max()
    errors = {name: ((result - oracle).abs().max() / size).item() for name, result in found.items()}
    # In fp32 the host is the measure itself: both are rounded in each of many layers.
    roundings = 64 if model.dtype == torch.float32 else 4
    bound = 2 * errors["stock"] + roundings * torch.finfo(model.dtype).eps
    return {"error": errors["flashbias"], "host_error": errors["stock"], "accurate": errors["flashbias"] <= bound}


def prefills(model: Any, tokens: int, device: str, full: Collection[str] = ()) -> list[dict[str, Any]]:
    """A row for each attention: median time and peak memory of the layers on one prompt, its cache filled.

    Logits are left out. Attentions take turns, so that a drift of the machine meets all of them; those in `full`, for
    which less did not fit, are not tried.
    """
    rows = {attention: _row("prefill", attention, tokens, partial(peak, model, attention, tokens, device))
            for attention in ATTENTIONS if attention not in full}  # fmt: skip
    alive = [attention for attention, row in rows.items() if not row["reason"]]
    times: dict[str, list[float]] = {attention: [] for attention in alive}
    turns = REPEATS
    while alive and min(len(times[attention]) for attention in alive) < turns:
        for attention in alive:
            try:
                times[attention] += prefill(model, attention, tokens, device)
            except Exception as failure:
                rows[attention]["reason"] = reason(failure)
        alive = [attention for attention in alive if not rows[attention]["reason"]]
        shortest = min((statistics.median(times[attention]) for attention in alive), default=ENOUGH)
        turns = min(max(int(ENOUGH / max(shortest, 1e-3)), REPEATS), MOST)
    for attention in alive:
        rows[attention]["milliseconds"] = round(statistics.median(times[attention]), 3)
    skipped = {"reason": "a shorter prompt: OutOfMemoryError"}
    return [rows.get(attention) or _empty_row("prefill", attention, tokens) | skipped for attention in ATTENTIONS]


def peak(model: Any, attention: str, tokens: int, device: str) -> dict[str, Any]:
    """Peak memory of the layers on a prompt of so many tokens."""
    import torch

    from flashbias.recipes.memory import peak_memory

    ids = _ids(model, tokens, device)
    free(device)
    with torch.no_grad(), as_asked(attention):
        memory = peak_memory(lambda: model.base_model(ids, use_cache=True), device)[1]
    return {"peak_mib": round(memory / 2**20)}


def prefill(model: Any, attention: str, tokens: int, device: str) -> list[float]:
    """Milliseconds of the layers on a prompt of so many tokens, `TURN` times after a first one."""
    import torch

    ids = _ids(model, tokens, device)
    with torch.no_grad(), as_asked(attention):
        model.base_model(ids, use_cache=True)
        return [milliseconds(lambda: model.base_model(ids, use_cache=True), device) for _ in range(TURN)]


def decodings(model: Any, tokens: int, device: str) -> list[dict[str, Any]]:
    """A row for each attention: tokens a second, one at a time, behind a prompt of so many, which ours reads.

    Attentions take turns behind one cache, which grows by little; the first turn only warms them up.
    """
    import torch

    ids, attentions = _ids(model, 1, device), (*ATTENTIONS, NO_CUDNN)
    rows = {attention: _empty_row("decode", attention, tokens) for attention in attentions}
    cache: Any = None

    def step() -> None:
        for _ in range(DECODED):
            model.base_model(ids, past_key_values=cache, use_cache=True)

    times: dict[str, list[float]] = {attention: [] for attention in attentions}
    for _, attention in product(range(1 + REPEATS), attentions):
        if rows[attention]["reason"]:
            continue
        try:
            with torch.no_grad():
                if cache is None:
                    with as_asked("flashbias"):
                        cache = model.base_model(_ids(model, tokens, device), use_cache=True).past_key_values
                with as_asked(attention):
                    times[attention].append(milliseconds(step, device))
        except Exception as failure:
            rows[attention]["reason"] = reason(failure)
            cache = None  # some layers have one key more than others
            free(device)
    for attention, row in rows.items():
        if not row["reason"]:
            elapsed = statistics.median(times[attention][1:]) / DECODED
            row |= {"milliseconds": round(elapsed, 3), "tokens_per_second": round(1e3 / elapsed, 2)}
    return list(rows.values())


def _ids(model: Any, tokens: int, device: str) -> Any:
    import torch

    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(model.config.vocab_size, (1, tokens), generator=generator).to(device)
