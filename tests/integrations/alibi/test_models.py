"""Whole models against the host's own code on the same weights: logits, gradients, caches, compiled graphs."""

import contextlib
import copy
from collections import Counter

import pytest
import torch
import torch._dynamo.testing
from prompts import DEVICE, MASKS, Largest, Operations, make_ids, make_mask

from flashbias.testing import assert_as_accurate

from .conftest import HOSTS

LAYERS = {"bloom": "n_layer", "mpt": "n_layers", "falcon": "num_hidden_layers"}

every_host = pytest.mark.parametrize("kind", HOSTS)


def tokens_of(mask, ids):
    return torch.ones_like(ids).bool() if mask is None else mask.bool()


def run(model, ids, mask, dtype=torch.float32, backward=False, **options):
    """Logits at tokens, and with `backward` the gradients of all weights, each over its largest entry, in one row."""
    model = copy.deepcopy(model).to(dtype)
    logits = model(ids, attention_mask=mask, **options).logits
    logits = logits * tokens_of(mask, ids)[..., None]
    found = {"logits": logits}
    if backward:
        weights = torch.linspace(-1, 1, logits.numel(), device=DEVICE).view_as(logits).sin().to(logits.dtype)
        (logits * weights).sum().backward()
        found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found


def in_one_row(found, sizes):
    return torch.cat([(found[name] / sizes[name]).flatten() for name in sizes])


def assert_like_the_host(stock, model, ids, mask, backward=False, **options):
    """As accurate as the host in fp32, its fp64 being the truth; relative to each tensor's largest entry.

    Where the host has no fp64 (NaN where a query attends nowhere, and MPT in transformers 4), both may be off by 32
    times the rounding of fp32, for each of two layers forward and back.
    """
    ours = run(model, ids, mask, backward=backward, **options)
    with stock():
        theirs = run(model, ids, mask, backward=backward, **options)
        oracle = None
        with contextlib.suppress(RuntimeError):
            oracle = run(model, ids, mask, torch.float64, backward=backward, **options)
    assert ours.keys() == theirs.keys()
    sizes = {name: entry.abs().max().clamp(min=1.0) for name, entry in theirs.items()}
    if oracle is None or not oracle["logits"].isfinite().all():
        difference = (in_one_row(ours, sizes) - in_one_row(theirs, sizes)).abs().max()
        assert difference <= 64 * torch.finfo(torch.float32).eps
        return
    rows = (in_one_row(found, sizes) for found in (ours, theirs, oracle))
    assert_as_accurate("logits and gradients", *rows, torch.float32)


@every_host
@pytest.mark.parametrize("mask", MASKS)
def test_logits_and_gradients(make_model, stock, calls, kind, mask):
    model, ids = make_model(kind), make_ids(3, 19)
    assert_like_the_host(stock, model, ids, make_mask(mask, 3, 19), backward=True)
    assert len(calls) == 2


@every_host
def test_heads_that_are_a_power_of_two(make_model, stock, kind):
    name = {"bloom": "n_head", "mpt": "n_heads", "falcon": "num_attention_heads"}[kind]
    model, ids = make_model(kind, **{name: 4}), make_ids(2, 40)
    assert_like_the_host(stock, model, ids, make_mask("left", 2, 40))


@pytest.mark.parametrize(
    "options", [{"multi_query": True}, {"new_decoder_architecture": True, "num_kv_heads": 2, "parallel_attn": True}]
)
def test_falcons_shared_key_heads(make_model, stock, options):
    model, ids = make_model("falcon", **options), make_ids(2, 15)
    assert_like_the_host(stock, model, ids, make_mask("left", 2, 15), backward=True)


def test_falcons_rotary_models_are_left_alone(make_model, stock, calls, caplog):
    model, ids = make_model("falcon", alibi=False), make_ids(2, 9)
    ours = model(ids).logits
    with stock():
        torch.testing.assert_close(ours, model(ids).logits, rtol=0, atol=0)
    assert not calls
    assert "not covered" not in caplog.text


def test_falcons_eager_models_have_alibi_once(make_model, stock):
    model, ids = make_model("falcon", attention="eager"), make_ids(2, 15)
    twin = make_model("falcon", attention="sdpa")
    twin.load_state_dict(model.state_dict())
    ours = model(ids).logits
    with stock():
        torch.testing.assert_close(ours, twin(ids).logits, rtol=1e-4, atol=1e-4)
        assert (model(ids).logits - ours).abs().max() > 0.1


def test_mpts_other_attention_settings(make_model, stock, transformers):
    attn_config = {"clip_qkv": 0.5, "softmax_scale": 0.3}
    model, ids = make_model("mpt", attn_config=attn_config), make_ids(2, 15)
    assert model.transformer.blocks[0].attn.clip_qkv == 0.5
    assert_like_the_host(stock, model, ids, None)


def test_mpt_at_more_keys_than_its_longest(make_model, stock):
    model, ids = make_model("mpt", max_seq_len=8), make_ids(1, 30)
    longer = make_model("mpt", max_seq_len=64)
    longer.load_state_dict(model.state_dict())
    ours = model(ids).logits
    with stock():
        torch.testing.assert_close(ours, longer(ids).logits, rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError):
            model(ids)


@every_host
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_close_to_fp32_as_the_host(make_model, stock, kind, dtype):
    options = {"max_seq_len": 600} if kind == "mpt" else {}
    model, ids = make_model(kind, **options), make_ids(1, 600)
    with torch.no_grad():
        ours = run(model, ids, None, dtype)["logits"]
        with stock():
            theirs, oracle = run(model, ids, None, dtype)["logits"], run(model, ids, None)["logits"]
    assert ours.dtype == dtype
    size = oracle.abs().max()
    assert_as_accurate("logits", ours / size, theirs / size, oracle / size, dtype)


@every_host
def test_autocast(make_model, stock, calls, kind):
    model, ids = make_model(kind), make_ids(2, 33)
    with torch.no_grad():
        with torch.autocast(DEVICE, torch.bfloat16):
            ours = model(ids).logits
        with stock():
            oracle = model(ids).logits
            with torch.autocast(DEVICE, torch.bfloat16):
                theirs = model(ids).logits
    assert len(calls) == 2
    assert_as_accurate("logits", ours / 10, theirs / 10, oracle / 10, torch.bfloat16)


@every_host
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("steps", [[9, 1, 1], [4, 5, 2]], ids=str)
def test_chunks_and_steps_through_a_dynamic_cache(make_model, stock, transformers, kind, mask, steps):
    model, ids, mask = make_model(kind), make_ids(3, 11), make_mask(mask, 3, 11)
    cache, parts, first = transformers.DynamicCache(), [], 0
    with torch.no_grad():
        for step in steps:
            end = first + step
            given = None if mask is None else mask[:, :end]
            parts.append(model(ids[:, first:end], attention_mask=given, past_key_values=cache, use_cache=True).logits)
            first = end
        with stock():
            expected = model(ids, attention_mask=mask).logits
    tokens = tokens_of(mask, ids)
    torch.testing.assert_close(torch.cat(parts, 1)[tokens], expected[tokens], rtol=1e-4, atol=1e-4)


@every_host
@pytest.mark.parametrize("mask", [None, "left", "holes"])
@pytest.mark.parametrize("steps", [[9, 1, 1], [4, 5, 2]], ids=str)
def test_chunks_and_steps_through_a_static_cache(make_model, stock, calls, transformers, kind, mask, steps):
    model, ids, mask = make_model(kind), make_ids(3, 11), make_mask(mask, 3, 11)
    older = transformers.__version__.startswith("4")
    if kind == "mpt" and older:
        pytest.skip("MPT had no static caches in transformers 4")
    cache = transformers.StaticCache(model.config, max_cache_len=16)
    full = torch.ones(3, 11, dtype=torch.long, device=DEVICE) if mask is None else mask
    full = torch.nn.functional.pad(full, (0, 5))
    parts, first = [], 0
    with torch.no_grad():
        for step in steps:
            end = first + step
            options = {"cache_position": torch.arange(first, end, device=DEVICE)} if older else {}
            given = full.clone()
            given[:, end:] = 0
            given = None if mask is None and not older else given
            step_ids = ids[:, first:end]
            parts.append(model(step_ids, attention_mask=given, past_key_values=cache, use_cache=True, **options).logits)
            first = end
        with stock():
            expected = model(ids, attention_mask=mask).logits
    tokens = tokens_of(mask, ids)
    torch.testing.assert_close(torch.cat(parts, 1)[tokens], expected[tokens], rtol=1e-4, atol=1e-4)
    assert {key[-2] for _, key, _ in calls} == {16}


@every_host
@pytest.mark.parametrize("mask", [None, "left"])
def test_nothing_grows_with_the_square_of_the_length(make_model, stock, kind, mask):
    n = 500
    options = {"max_seq_len": n} if kind == "mpt" else {}
    model, ids, mask = make_model(kind, **options), make_ids(2, n), make_mask(mask, 2, n)
    with torch.no_grad():
        with Largest() as ours:
            model(ids, attention_mask=mask)
        with stock(), Largest() as theirs:
            model(ids, attention_mask=mask)
    assert ours.entries < n * n < theirs.entries


@every_host
@pytest.mark.parametrize("work", ["prompt", "decoding"])
def test_a_layer_launches_nothing_that_the_host_does_not_but_the_operator(make_model, stock, transformers, kind, work):
    ids = make_ids(1, 20)

    def of_one_layer():
        """What three layers do and two do not."""
        counted = []
        for layers in (3, 2):
            model, cache = make_model(kind, **{LAYERS[kind]: layers}), transformers.DynamicCache()
            with torch.no_grad():
                if work == "decoding":
                    model(ids, past_key_values=cache, use_cache=True)
                with Operations() as operations:
                    model(ids if work == "prompt" else ids[:, :1], past_key_values=cache, use_cache=True)
            counted.append(operations)
        more, fewer = counted
        return more.calls - fewer.calls, more.views - fewer.views

    ours, views = of_one_layer()
    with stock():
        theirs, host_views = of_one_layer()
    # Outputs are copied where heads come together, as by hosts without SDPA. Of a mask, which older BLOOM always has,
    # the operator looks at the ids of queries and keys.
    assert not ours - theirs - Counter({"attention": 1, "clone": 1, "ne": 2})
    assert ours.total() <= theirs.total() + 3
    assert views < host_views, "each takes the host a microsecond or two"


@every_host
@pytest.mark.parametrize("mask", ["left", "holes"])
def test_one_query_behind_padding_has_it_in_its_bias(make_model, monkeypatch, transformers, kind, mask):
    """One tensor says what positions, slopes and ids would say, for all layers."""
    from flashbias.prepared import Prepared

    given, operator = [], Prepared.__call__

    def noting(self, query, key, value):
        given.append((self.bias, self.mask))
        return operator(self, query, key, value)

    monkeypatch.setattr(Prepared, "__call__", noting)
    model, ids, cache = make_model(kind), make_ids(3, 11), transformers.DynamicCache()
    mask = make_mask(mask, 3, 11)
    with torch.no_grad():
        model(ids[:, :10], attention_mask=mask[:, :10], past_key_values=cache, use_cache=True)
        given.clear()
        model(ids[:, 10:], attention_mask=mask, past_key_values=cache, use_cache=True)
    (bias, others), (again, _) = given
    assert bias is again
    assert others is None
    hidden = (mask == 0)[:, None, None]
    assert bool(hidden.any())
    assert torch.equal(bias.values == -torch.inf, hidden.expand_as(bias.values))


@every_host
def test_gradient_checkpointing(make_model, stock, calls, kind):
    model, ids = make_model(kind).train(), make_ids(2, 13)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = run(model, ids, None, backward=True)
    made = len(calls)
    model.gradient_checkpointing_enable()
    found = run(model, ids, None, backward=True)
    assert len(calls) == made + 4, "forward, and once more on the way back"
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


@every_host
def test_a_step_of_training_is_that_of_the_host(make_model, stock, kind):
    model, ids = make_model(kind).train(), make_ids(2, 13)

    def trained():
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=1e-2)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = twin(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    ours = trained()
    with stock():
        theirs = trained()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@every_host
def test_compiled_in_one_graph(make_model, stock, kind):
    model = make_model(kind, **{LAYERS[kind]: 1})
    torch.compiler.reset()
    # Two hosts take the log2 of their number of heads, for which torch 2.7 can write no guard: there only what changes
    # from call to call is dynamic.
    dynamic = True if torch.__version__ >= "2.8" else None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)

    def logits(call, ids):
        mask = make_mask("left", *ids.shape)
        return call(ids, attention_mask=mask, use_cache=False).logits[tokens_of(mask, ids)]

    texts = [make_ids(2, n) for n in (12, 19)]
    with torch.no_grad():
        ours = [logits(compiled, ids) for ids in texts]  # both before the host's own code, after which it compiles anew
        with stock():
            theirs = [logits(model, ids) for ids in texts]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@every_host
def test_decoding_with_a_static_cache_compiles_once(make_model, stock, transformers, kind):
    if kind == "mpt" and transformers.__version__.startswith("4"):
        pytest.skip("MPT had no static caches in transformers 4")
    model, ids = make_model(kind, **{LAYERS[kind]: 1}), make_ids(2, 9)
    tokens = make_mask("left", 2, 9)
    cache = transformers.StaticCache(model.config, max_cache_len=16)

    def step(call, first, end):
        given = torch.zeros(2, 16, dtype=torch.long, device=DEVICE)
        given[:, :end] = tokens[:, :end]
        older = transformers.__version__.startswith("4")
        options = {"cache_position": torch.arange(first, end, device=DEVICE)} if older else {}
        return call(ids[:, first:end], attention_mask=given, past_key_values=cache, **options).logits

    torch.compiler.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    with torch.no_grad():
        step(model, 0, 6)
        ours = torch.cat([step(compiled, first, first + 1) for first in range(6, 9)], 1)
        with stock():
            theirs = model(ids, attention_mask=tokens).logits[:, 6:]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert counted.frame_count == 1
    torch.compiler.reset()


@every_host
@pytest.mark.parametrize("mask", [None, "left", "right", "holes"])
def test_long_call_looks_whether_all_tokens_count(make_model, stock, monkeypatch, kind, mask):
    """What it finds changes how it computes, and not what comes out."""
    from flashbias.integrations import language_models
    from flashbias.integrations.alibi.positions import Positions

    made = []
    place = Positions.place
    monkeypatch.setattr(Positions, "place", lambda *args: made.append(place(*args)) or made[-1])
    monkeypatch.setattr(language_models, "LONG", 8)
    model, ids = make_model(kind), make_ids(3, 11)
    counts = torch.ones_like(ids) if mask is None else make_mask(mask, 3, 11)
    assert_like_the_host(stock, model, ids, counts)
    assert made
    assert all((entry.k_ids is None) == (mask is None) for entry in made)


def test_what_layers_share_follows_to_another_device(alibi):
    from flashbias.integrations.alibi.positions import Positions

    positions = Positions(2, 4, None, torch.zeros(1, 4).int(), torch.zeros(2).int(), torch.ones(2))
    bias = positions.once("bias", positions.bias)
    assert positions.once("bias", positions.bias) is bias
    positions.to("meta")
    assert positions.once("bias", positions.bias).slopes.device.type == "meta"
    assert positions.once("mask", positions.mask).k_ids.device.type == "meta"
