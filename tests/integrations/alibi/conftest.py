"""BLOOM, MPT and Falcon of the installed transformers, small, with weights that make every bias and mask matter.

`make test-transformers4` runs these tests on the older major version of transformers.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from prompts import DEVICE, VOCABULARY

HOSTS = ("bloom", "mpt", "falcon")

# Six heads, because slopes of a number that is no power of two have an order; and what models are opened with.
OPTIONS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 6},
    "mpt": {"d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 64},
    "falcon": {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "alibi": True, "multi_query": False,
        "new_decoder_architecture": False, "parallel_attn": False, "bias": True,
    },
}  # fmt: skip
CLASSES = {"bloom": "Bloom", "mpt": "Mpt", "falcon": "Falcon"}


def pytest_report_header() -> list[str]:
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return [f"transformers: {metadata.version('transformers')}"]
    return ["transformers: not installed"]


@pytest.fixture
def alibi(transformers: Any) -> Iterator[Any]:
    """The integration, applied with default settings; taken out afterwards."""
    module = importlib.import_module("flashbias.integrations.alibi")
    module.apply()
    yield module
    module.configure()
    module.revert()


@pytest.fixture
def applied(alibi: Any) -> Any:
    return alibi


@pytest.fixture
def make_model(alibi: Any, transformers: Any) -> Callable[..., Any]:
    """`make_model("bloom", attention="eager", **config)`: a causal language model, in evaluation.

    Falcon's own code is right by its SDPA path only.
    """

    def make(kind: str, attention: str | None = None, **options: Any) -> Any:
        config = getattr(transformers, f"{CLASSES[kind]}Config")(
            vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=None, pad_token_id=0, **(OPTIONS[kind] | options)
        )
        config._attn_implementation = attention or ("sdpa" if kind == "falcon" else "eager")
        model = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(config)
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.uniform_(-0.5, 1.5)
        return model.to(DEVICE).eval()

    return make


@pytest.fixture
def calls(alibi: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of queries and keys, and the mask, of every call of the operator by a replacement."""
    from flashbias.prepared import Prepared

    made: list[Any] = []
    operator = Prepared.__call__

    def counting(self: Any, query: Any, key: Any, value: Any) -> Any:
        made.append((query.shape, key.shape, self.mask))
        return operator(self, query, key, value)

    monkeypatch.setattr(Prepared, "__call__", counting)
    return made
