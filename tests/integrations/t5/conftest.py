"""T5, mT5 and UMT5 of the installed transformers, small, with weights that make every bias and mask matter.

`make test-transformers4` runs these tests on the older major version of transformers.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from prompts import DEVICE, VOCABULARY

HOSTS = ("T5", "MT5", "UMT5")
LAYERS = 2


@pytest.fixture
def t5(transformers: Any) -> Iterator[Any]:
    """The integration, applied; taken out afterwards."""
    module = importlib.import_module("flashbias.integrations.t5")
    module.apply()
    yield module
    module.revert()


@pytest.fixture
def applied(t5: Any) -> Any:
    return t5


@pytest.fixture
def make_model(t5: Any, transformers: Any) -> Callable[..., Any]:
    """`make_model("T5", attention="eager", task="ForConditionalGeneration", **config)`, in evaluation.

    Buckets end within the texts of the tests.
    """

    def make(kind: str, attention: str = "eager", task: str = "ForConditionalGeneration", **options: Any) -> Any:
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4, "dropout_rate": 0.0}
        buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
        tokens = {"vocab_size": VOCABULARY, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}
        config = getattr(transformers, f"{kind}Config")(**(tokens | sizes | buckets | options))
        config._attn_implementation = attention
        model = getattr(transformers, f"{kind}{task}")(config)
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                torch.nn.init.normal_(parameter, std=2.0)
            elif name.endswith(".q.weight"):  # T5 has no scale but that of these weights
                torch.nn.init.normal_(parameter, std=0.3 / 8**0.5)
        return model.to(DEVICE).eval()

    return make


@pytest.fixture
def calls(t5: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of queries and keys, the bias and the mask of every call of the operator by the replacement."""
    made: list[Any] = []
    layer = importlib.import_module("flashbias.integrations.t5.attention")
    operator = layer.biased_attention

    def counting(query: Any, key: Any, value: Any, bias: Any, **options: Any) -> Any:
        made.append((query.shape, key.shape, bias, options["mask"]))
        return operator(query, key, value, bias, **options)

    monkeypatch.setattr(layer, "biased_attention", counting)
    return made
