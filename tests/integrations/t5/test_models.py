"""Whole models against the host's own code on the same weights: logits, gradients, caches, compiled graphs."""

import copy
import importlib
import inspect

import pytest
import torch
from prompts import DEVICE, MASKS, WRITING, Largest, make_ids, make_mask

from flashbias import Causal, RelativePositionBias
from flashbias.testing import assert_as_accurate

from .conftest import HOSTS, LAYERS

every_host = pytest.mark.parametrize("kind", HOSTS)
N_Q = 17


def attentions(transformers, kind):
    """The attentions to try a model with: T5 asks transformers' interface since 5.18 only.

    Where UMT5's layers do not say that they are causal, its decoder sees later tokens through SDPA: the host is wrong.
    """
    host = getattr(transformers, f"{kind}ForConditionalGeneration")
    blind = kind == "UMT5" and "is_causal=config.is_decoder" not in inspect.getsource(inspect.getmodule(host))
    return ["eager", "sdpa"] if host._supports_sdpa and not blind else ["eager"]


def run(model, ids, mask, dtype=torch.float32, n_q=N_Q, decoder_mask=None, backward=False):
    """Logits at tokens, and with `backward` the gradients of all weights."""
    model = copy.deepcopy(model).to(dtype)
    given = {"input_ids": ids, "attention_mask": mask, "decoder_attention_mask": decoder_mask}
    logits = model(**given, decoder_input_ids=ids[:, :n_q]).logits
    if decoder_mask is not None:
        logits = logits * decoder_mask[..., None].bool()
    found = {"logits": logits}
    if backward:
        weights = torch.linspace(-1, 1, logits.numel(), device=ids.device).view_as(logits).mul(50).sin().to(dtype)
        (logits * weights).sum().backward()
        found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found


def in_one_row(found, sizes):
    return torch.cat([(found[name] / sizes[name]).detach().flatten() for name in sizes])


def assert_like_the_host(ours, stock, *args, **options):
    """At most twice the host's error in fp32, its fp64 being the truth, each tensor relative to its largest entry.

    As norms, since single entries of two computations are wrong by chance. Where the host has no fp64 (NaN where it
    masks by the lowest number, in transformers 4) the two may differ by three times what either is wrong by elsewhere.
    """
    with stock():
        theirs, oracle = run(*args, **options), run(*args, dtype=torch.float64, **options)
    assert ours.keys() == theirs.keys()
    sizes = {name: entry.abs().max().clamp(min=1.0) for name, entry in theirs.items()}
    ours, theirs, oracle = (in_one_row(found, sizes) for found in (ours, theirs, oracle))
    eps = torch.finfo(torch.float32).eps
    if oracle.isfinite().all():
        assert (ours - oracle).norm() <= 2 * (theirs - oracle).norm() + 4 * eps * oracle.norm()
    else:
        assert (ours - theirs).norm() <= 3 * 32 * eps * theirs.norm()


@every_host
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("decoder_mask", [None, "left", "right"])
def test_logits_and_gradients(make_model, stock, calls, transformers, kind, mask, decoder_mask):
    for attention in attentions(transformers, kind):
        model, ids = make_model(kind, attention), make_ids(3, 29)
        masks = make_mask(mask, 3, 29), make_mask(decoder_mask, 3, N_Q)
        ours = run(model, ids, masks[0], decoder_mask=masks[1], backward=True)
        assert len(calls) == 3 * LAYERS, "an encoder, a decoder and its cross attention"
        assert_like_the_host(ours, stock, model, ids, masks[0], decoder_mask=masks[1], backward=True)
        tables = [entry for name, entry in ours.items() if "relative_attention_bias" in name]
        assert len(tables) == (2 * LAYERS if kind == "UMT5" else 2)
        assert all(entry.abs().max() > 0 for entry in tables)
        calls.clear()


@every_host
def test_buckets_that_end_far_away(make_model, stock, kind):
    """Those of the pretrained models: 32 up to 128."""
    buckets = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
    model, ids = make_model(kind, **buckets), make_ids(1, 330)
    ours = run(model, ids, None, n_q=300)
    assert_like_the_host(ours, stock, model, ids, None, n_q=300)


def test_tables_hold_the_buckets(t5, make_model):
    from flashbias.integrations.t5 import attention as layer

    for kind in HOSTS:
        buckets = layer.own_buckets if kind == "UMT5" else layer.shared_buckets
        for attention in make_model(kind).modules():
            if getattr(attention, "has_relative_attention_bias", False):
                matrix = RelativePositionBias(layer.make_table(attention, buckets)).dense(40, 40, offset=0)
                assert torch.equal(matrix, attention.compute_bias(40, 40)[0])


@every_host
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_close_to_fp32_as_the_host(make_model, stock, kind, dtype):
    model, ids = make_model(kind), make_ids(2, 100)
    with torch.no_grad():
        ours = run(model, ids, None, dtype, n_q=90)["logits"]
        with stock():
            theirs, oracle = run(model, ids, None, dtype, n_q=90)["logits"], run(model, ids, None, n_q=90)["logits"]
    assert ours.dtype == theirs.dtype
    size = oracle.abs().max()
    assert_as_accurate("logits", ours / size, theirs / size, oracle / size, dtype)


@every_host
def test_autocast(make_model, stock, calls, kind):
    model, ids = make_model(kind), make_ids(2, 33)
    with torch.no_grad():
        with torch.autocast(DEVICE, torch.bfloat16):
            ours = run(model, ids, None)["logits"]
        with stock():
            oracle = run(model, ids, None)["logits"]
            with torch.autocast(DEVICE, torch.bfloat16):
                theirs = run(model, ids, None)["logits"]
    assert len(calls) == 3 * LAYERS
    size = oracle.abs().max()
    assert_as_accurate("logits", ours / size, theirs / size, oracle / size, torch.bfloat16)


@every_host
def test_encoder_alone(make_model, stock, calls, kind):
    model, ids = make_model(kind, task="EncoderModel"), make_ids(2, 41)
    mask = make_mask("right", 2, 41)
    ours = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert len(calls) == LAYERS
    with stock():
        theirs = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@every_host
@pytest.mark.parametrize("mask", [None, "left", "holes"])
@pytest.mark.parametrize("steps", [[9, 1, 1], [4, 5, 2]], ids=str)
def test_chunks_and_steps_through_a_cache(make_model, stock, calls, transformers, kind, mask, steps):
    model, ids, mask = make_model(kind), make_ids(3, 21), make_mask(mask, 3, 21)
    text = ids[:, :11]
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    parts, first = [], 0
    with torch.no_grad():
        memory = model.get_encoder()(ids, attention_mask=mask)
        for step in steps:
            given = {"encoder_outputs": memory, "attention_mask": mask, "past_key_values": cache}
            parts.append(model(decoder_input_ids=text[:, first : first + step], **given).logits)
            first += step
        with stock():
            expected = model(input_ids=ids, attention_mask=mask, decoder_input_ids=text).logits
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    assert [key[-2] for _, key, bias, _ in calls if bias is None] == [21] * LAYERS * 3


@every_host
@pytest.mark.parametrize("way", WRITING)
def test_generate(make_model, stock, calls, kind, way):
    """Token for token what the host's own code in fp32 writes, to five prompts of different lengths."""
    model, ids, mask = make_model(kind), make_ids(5, 19), make_mask("right", 5, 19)

    def write():
        return model.generate(ids, attention_mask=mask, **WRITING[way])

    ours, n = write(), WRITING[way]["max_new_tokens"]
    assert ours.shape == (5, 1 + n)
    assert len(calls) == LAYERS + n * 2 * LAYERS
    with stock():
        assert torch.equal(ours, write())


@every_host
def test_tables_are_kept_until_their_weights_change(make_model, stock, monkeypatch, kind):
    layer = importlib.import_module("flashbias.integrations.t5.attention")
    made, make_table = [], layer.make_table
    monkeypatch.setattr(layer, "make_table", lambda *known: made.append(1) or make_table(*known))
    model, ids = make_model(kind), make_ids(2, 19)
    tables = [weight for name, weight in model.named_parameters() if "relative_attention_bias" in name]
    for _ in range(2):
        made.clear()
        ours = model.generate(ids, **WRITING["greedy"] | {"max_new_tokens": 9})
        assert len(made) == len(tables), "for nine tokens"
        with stock():
            assert torch.equal(ours, model.generate(ids, **WRITING["greedy"] | {"max_new_tokens": 9}))
        with torch.no_grad():
            for weight in tables:
                weight.mul_(-1)
    made.clear()
    run(model, ids, None, backward=True)
    assert len(made) == len(tables), "with gradients, in every call"


@pytest.mark.parametrize("kind", ["T5", "UMT5"])
def test_generate_with_a_static_cache(make_model, stock, calls, kind):
    model, ids, mask = make_model(kind), make_ids(3, 9), make_mask("left", 3, 9)

    def write(**options):
        return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)

    ours = write(cache_implementation="static", disable_compile=True)
    assert len(calls) == LAYERS + 12 * 2 * LAYERS
    assert len({key for query, key, bias, _ in calls if query[-2] == 1 and bias is not None}) == 1
    with stock():
        assert torch.equal(ours, write())


@every_host
@pytest.mark.parametrize("mask", [None, "right"])
def test_nothing_grows_with_the_square_of_the_length(make_model, stock, kind, mask):
    n = 500
    model, ids, mask = make_model(kind), make_ids(2, n), make_mask(mask, 2, n)
    with torch.no_grad():
        with Largest() as ours:
            run(model, ids, mask, n_q=n)
        with stock(), Largest() as theirs:
            run(model, ids, mask, n_q=n)
    assert ours.entries < n * n < theirs.entries


@every_host
@pytest.mark.parametrize("mask", [None, "right"])
def test_masks_say_no_more_than_they_must(make_model, calls, kind, mask):
    """Long encoders look whether all tokens count, once: without padding they have no mask, and decoders a diagonal."""
    n = 256
    model, ids = make_model(kind), make_ids(2, n)
    counts = torch.ones_like(ids) if mask is None else make_mask(mask, 2, n)
    with torch.no_grad():
        run(model, ids, counts, n_q=n)
    whole = [given for _, _, _, given in calls]
    encoder, decoder, cross = whole[:LAYERS], whole[LAYERS::2], whole[LAYERS + 1 :: 2]
    assert all((given is None) == (mask is None) for given in encoder + cross)
    assert all(isinstance(given, Causal) for given in decoder)


@every_host
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(make_model, calls, kind, reentrant):
    model, ids = make_model(kind).train(), make_ids(2, 23)
    expected = run(model, ids, None, backward=True)
    made = len(calls)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # or nothing that goes into the first layer has a gradient
        model.enable_input_require_grads()
    found = run(model, ids, None, backward=True)
    assert len(calls) == 3 * made, "forward, and once more on the way back"
    for name in expected:
        size = expected[name].abs().max().clamp(min=1.0)
        torch.testing.assert_close(found[name] / size, expected[name] / size, rtol=1e-5, atol=1e-5)


@every_host
def test_a_layer_of_the_hosts_among_ours(make_model, calls, caplog, kind):
    """It gets the position bias as its own code wants it; those behind it go on with the table."""
    model, ids, mask = make_model(kind, num_layers=3).train(), make_ids(2, 23), make_mask("right", 2, 23)
    ours = run(model, ids, mask, backward=True)
    made = len(calls)
    for stack in (model.encoder, model.decoder):
        stack.block[1].layer[0].SelfAttention.dropout = 1e-30
    mixed = run(model, ids, mask, backward=True)
    assert len(calls) == 2 * made - 2
    assert caplog.text.count("attention dropout in training is not covered") == 1
    for name, entry in ours.items():
        torch.testing.assert_close(mixed[name], entry, rtol=1e-3, atol=1e-4 * entry.abs().max().item())


@pytest.mark.parametrize("kind", ["T5", "UMT5"])  # MT5 is T5 with other sizes, and half a minute more
def test_compiled_in_one_graph(make_model, stock, kind):
    model = make_model(kind, num_layers=1)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)

    def logits(call, ids):
        mask = make_mask("right", *ids.shape)
        return call(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, 2:], use_cache=False).logits

    texts = [make_ids(2, n) for n in (22, 29)]
    with torch.no_grad():
        ours = [logits(compiled, ids) for ids in texts]  # both before the host's own code, after which it compiles anew
        with stock():
            theirs = [logits(model, ids) for ids in texts]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
