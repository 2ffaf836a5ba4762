"""`flashbias language-model generate`: what models write, token for token beside the host's own code in fp32."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import models, t5
from .measuring import choose, free, milliseconds, random_model, reason, row_store

SIZES = models.MODELS | {name: ("T5", options) for name, options in t5.SIZES.items()}
LAYERS = {"Bloom": "n_layer", "Mpt": "n_layers", "Falcon": "num_hidden_layers", "T5": "num_layers"}
PROMPTS, LONGEST = 5, 64  # of the prompts; each of the others is shorter by some tokens, which are padded
SHORTER = 9
FIRST = 3  # of a vocabulary come tokens that mean something else
# Random models soon write one word for ever, and what is forced says nothing: no pair of words may come twice.
WARM = 32  # tokens before those that are timed: among so many lengths is every one for which a kernel is compiled
WRITING = {"do_sample": False, "use_cache": True, "no_repeat_ngram_size": 2}


def run(names: Sequence[str], tokens: int, layers: int, path: Path | None, device: str, out: Path | None) -> int:
    """Compare and store, row by row; returns the exit code."""
    from flashbias.recipes import machine

    device = machine.choose_device(device)
    names = choose(names, list(SIZES), path)
    rows: list[dict[str, Any]] = []
    store = row_store("language_model_generate.csv", device, out)
    for name in names:
        for row in compare(name, tokens, layers, path, device):
            store(row)
            counted = f"written {row['equal']} (host {row['host_equal']})"
            likely = f"next {row['next_equal']} ({row['host_next_equal']}) of {row['of']}"
            print(f"{name:13} {row['dtype']:9} {counted} {likely} {row['reason']}", flush=True)
            rows.append(row)
    wrong = [row for row in rows if row["accurate"] is False or row["reason"]]
    print(json.dumps({"rows": len(rows), "wrong": len(wrong)}), flush=True)
    return 1 if wrong else 0


def compare(name: str, tokens: int, layers: int, path: Path | None, device: str) -> Iterator[dict[str, Any]]:
    """A row for each dtype: how many tokens are those of the host in fp32, ours and the host's own.

    equal: in what is written, up to the first in each text that differs; in fp32 all have to be, while in half
    precision a text goes its own way after one rounding. next_equal: of the most likely tokens behind each beginning
    of the texts that the host has written in fp32. tokens_per_second: behind the first `WARM` tokens of a process,
    which take first_seconds.
    """
    import torch

    columns = (
        "equal", "host_equal", "next_equal", "host_next_equal", "accurate", "tokens_per_second",
        "host_tokens_per_second", "first_seconds", "host_first_seconds", "reason",
    )  # fmt: skip
    base: dict[str, Any] = {"model": name, "layers": layers or "all", "of": PROMPTS * tokens}
    model = exact = None
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        row = base | {"dtype": str(dtype).removeprefix("torch.")} | dict.fromkeys(columns, "")
        try:
            model = make(name, layers, path, device) if model is None else model.to(dtype)
            theirs = found(model, False, tokens, device, exact)
            exact = theirs if exact is None else exact
            ours = found(model, True, tokens, device, exact)
            row["equal"], row["host_equal"] = (agreement(texts[0], exact[0]) for texts in (ours, theirs))
            row["next_equal"], row["host_next_equal"] = (int((a[1] == exact[1]).sum()) for a in (ours, theirs))
            row["accurate"] = row["equal"] == row["of"] if dtype == torch.float32 else ""
            row["tokens_per_second"], row["host_tokens_per_second"] = ours[2], theirs[2]
            row["first_seconds"], row["host_first_seconds"] = ours[3], theirs[3]
        except Exception as failure:
            row["reason"] = reason(failure)
        yield row
        free(device)
        if exact is None:
            return


def found(model: Any, ours: bool, tokens: int, device: str, exact: Any) -> tuple[Any, Any, float, float]:
    """What a model writes, its most likely tokens behind each beginning of the exact texts, tokens a second, and the
    seconds of a first call."""
    with patched(ours):
        _, first = write(model, min(tokens, WARM), device)
        texts, time = write(model, tokens, device)
        likely = next_tokens(model, texts if exact is None else exact[0], device)
    return texts, likely, round(texts.numel() * 1e3 / time, 1), round(first / 1e3, 2)


def make(name: str, layers: int, path: Path | None, device: str) -> Any:
    """The model in fp32, in evaluation; random weights of so many layers, or those of the path."""
    import torch

    from flashbias.integrations._torchvision import make_importable

    make_importable()
    import transformers

    kind, options = SIZES[name]
    cls = getattr(transformers, f"{kind}For{'ConditionalGeneration' if kind == 'T5' else 'CausalLM'}")
    attention = "sdpa" if kind == "Falcon" else "eager"  # Falcon's eager path adds ALiBi twice
    if path is not None:
        model = cls.from_pretrained(path, dtype=torch.float32, attn_implementation=attention).to(device)
    else:
        options = options | {"decoder_start_token_id": 0} if kind == "T5" else options
        config = getattr(transformers, f"{kind}Config")(**(options | ({LAYERS[kind]: layers} if layers else {})))
        config._attn_implementation = attention
        model = random_model(cls, config, device, torch.float32)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)  # all texts of one length
    return model.eval()


@contextmanager
def patched(ours: bool) -> Iterator[None]:
    """Inside, models run our attention, or their own."""
    from flashbias.integrations import alibi, t5

    for integration in (alibi, t5):
        (integration.apply if ours else integration.revert)()
    try:
        yield
    finally:
        alibi.revert()
        t5.revert()


def write(model: Any, tokens: int, device: str) -> tuple[Any, float]:
    """So many new tokens for each of the prompts, `(PROMPTS, tokens)`, and the milliseconds that they took."""
    ids, mask = prompts(model, device)
    texts: list[Any] = []

    def work() -> None:
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **WRITING))

    time = milliseconds(work, device)
    return texts[0][:, -tokens:], time


def next_tokens(model: Any, texts: Any, device: str) -> Any:
    """The most likely token in the place of each of the texts, `(PROMPTS, tokens)`, given all that stands before it."""
    import torch

    ids, mask = prompts(model, device)
    if model.config.is_encoder_decoder:
        begun = torch.nn.functional.pad(texts[:, :-1], (1, 0))
        given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": begun}
    else:
        both = torch.cat((ids, texts), 1)[:, :-1]
        given = {"input_ids": both, "attention_mask": torch.nn.functional.pad(mask, (0, texts.shape[1] - 1), value=1)}
    with torch.no_grad():
        return model(**given).logits[:, -texts.shape[1] :].argmax(-1)


def prompts(model: Any, device: str) -> tuple[Any, Any]:
    """Tokens and their mask, `(PROMPTS, LONGEST)`, padded on the side where a model wants it."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST, model.config.vocab_size, (PROMPTS, LONGEST), generator=generator).to(device)
    mask = torch.ones_like(ids)
    for row in range(PROMPTS):
        padding = slice(LONGEST - SHORTER * row, None) if model.config.is_encoder_decoder else slice(SHORTER * row)
        mask[row, padding] = 0
    return ids * mask, mask


def agreement(texts: Any, others: Any) -> int:
    """How many tokens are equal before the first in each text that differs."""
    return int((texts == others).long().cumprod(-1).sum())
