"""What is served and what is not: by name, by import, and what goes to the host's own code."""

import pytest
import torch
from packaging.version import Version
from prompts import DEVICE, make_ids, make_mask

from flashbias.errors import FlashBiasError, UnsupportedError
from flashbias.integrations import verify

from .conftest import HOSTS

every_host = pytest.mark.parametrize("kind", HOSTS)


@every_host
def test_revert_gives_the_host_its_own_functions_back(alibi, make_model, calls, kind):
    model, ids = make_model(kind), make_ids(1, 5)
    attention = {"bloom": "BloomAttention", "mpt": "MptAttention", "falcon": "FalconAttention"}[kind]
    cls = next(type(module) for module in model.modules() if type(module).__name__ == attention)
    assert cls.forward.__module__.startswith("flashbias.")
    assert alibi.revert() is True
    assert cls.forward.__module__ == cls.__module__
    assert not hasattr(cls, "forward_before_flashbias")
    model(ids)
    assert not calls
    assert alibi.apply() is True
    model(ids)
    assert len(calls) == 2
    assert all(host.ok and host.patched for host in alibi.INTEGRATION.status())


@every_host
def test_only_models_that_asked(alibi, make_model, calls, caplog, kind):
    alibi.configure(served="asked")
    ids, mask = make_ids(2, 9), make_mask("left", 2, 9)
    model, asked = make_model(kind), make_model(kind, attention=alibi.NAME)
    asked.load_state_dict(model.state_dict())
    theirs = model(ids, attention_mask=mask).logits
    assert not calls
    assert caplog.text.count("is not covered") == 1
    ours = asked(ids, attention_mask=mask).logits
    assert len(calls) == 2
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bloom", "mpt"])  # Falcon's own code then is its eager path
def test_models_that_asked_are_right_without_the_patch_too(alibi, make_model, stock, kind):
    ids, mask = make_ids(2, 9), make_mask("left", 2, 9)
    asked = make_model(kind, attention=alibi.NAME)
    ours = asked(ids, attention_mask=mask).logits
    with stock():
        theirs = asked(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=1e-4)


@every_host
def test_weights_that_somebody_wants_to_see(make_model, calls, caplog, kind):
    model, ids, mask = make_model(kind, attention="eager"), make_ids(2, 9), make_mask("left", 2, 9)
    ours = model(ids, attention_mask=mask).logits
    made = len(calls)
    theirs = model(ids, attention_mask=mask, output_attentions=True)
    assert len(calls) == made
    assert [weights.shape for weights in theirs.attentions] == [(2, 6, 9, 9)] * 2
    assert caplog.text.count("output_attentions is not covered") == 1
    torch.testing.assert_close(ours[mask.bool()], theirs.logits[mask.bool()], rtol=1e-4, atol=1e-4)


@every_host
def test_attention_dropout_in_training(make_model, stock, calls, caplog, kind):
    options = {} if kind == "mpt" else {"attention_dropout": 0.5}
    model, ids, mask = make_model(kind, **options).train(), make_ids(2, 9), make_mask("right", 2, 9)
    for module in model.modules():  # MPT's configuration takes whole numbers only
        if hasattr(module, "attn_dropout_p"):
            module.attn_dropout_p = 0.5

    def run():
        torch.manual_seed(0)
        return model(ids, attention_mask=mask).logits

    ours = run()
    assert not calls
    assert caplog.text.count("attention dropout in training is not covered") == 1
    with stock():
        torch.testing.assert_close(ours, run(), rtol=1e-4, atol=1e-4)
    model.eval()(ids)
    assert len(calls) == 2


def test_masks_of_four_dimensions_are_left_to_the_host(make_model, stock, calls, caplog, transformers):
    model, ids = make_model("mpt"), make_ids(2, 6)
    older = transformers.__version__.startswith("4")
    # What the host takes: 1 where a query attends in transformers 4, in 5 True where it does not.
    causal = torch.ones(2, 1, 6, 6, device=DEVICE).tril()
    mask = causal if older else causal == 0
    ours = model(ids, attention_mask=mask).logits
    assert not calls
    assert caplog.text.count("other than two dimensions") == 1
    torch.testing.assert_close(ours, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("static", [False, True])
def test_verified_run_leaves_the_cache_alone(make_model, transformers, monkeypatch, static):
    monkeypatch.setenv("FLASHBIAS_VERIFY", "1")
    model, ids = make_model("bloom"), make_ids(2, 9)
    options = {"cache_implementation": "static", "disable_compile": True} if static else {}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, **options)
    monkeypatch.delenv("FLASHBIAS_VERIFY")
    assert torch.equal(out, model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False))
    rows = verify.differences()
    assert [row.calls for row in rows] == [4, 4]
    assert all(row.difference < 1e-4 < row.largest for row in rows)


def test_unknown_choice(alibi):
    with pytest.raises(FlashBiasError, match="all"):
        alibi.configure(served="some")


def small_llama(transformers, attention):
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = attention
    return transformers.LlamaForCausalLM(config).to(DEVICE).eval()


@pytest.mark.parametrize("mask", ["left", "right"])
def test_other_models_by_name_keep_their_masks(alibi, transformers, mask):
    ids, mask = make_ids(3, 11), make_mask(mask, 3, 11)
    theirs, ours = small_llama(transformers, "sdpa"), small_llama(transformers, alibi.NAME)
    ours.load_state_dict(theirs.state_dict())
    expected, found = theirs(ids, attention_mask=mask).logits, ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_what_would_change_the_result_is_refused(alibi):
    from flashbias.integrations.alibi import interface

    q = torch.randn(1, 2, 3, 8, device=DEVICE)
    with pytest.raises(UnsupportedError, match="softcap"):
        interface.attention(torch.nn.Identity(), q, q, q, None, softcap=30.0)


@pytest.mark.parametrize("kind", ["T5", "MT5", "UMT5"])
def test_position_biases_of_the_t5_family_by_name(alibi, transformers, monkeypatch, kind):
    if Version(transformers.__version__) < Version("5.18"):
        pytest.skip("T5 does not ask the interface before transformers 5.18")
    from flashbias.integrations.alibi import interface

    calls = []
    operator = interface.biased_attention
    monkeypatch.setattr(interface, "biased_attention", lambda *args, **kw: calls.append(1) or operator(*args, **kw))
    options = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    models = []
    for attention in ("eager", alibi.NAME):
        config = getattr(transformers, f"{kind}Config")(vocab_size=61, decoder_start_token_id=0, **options)
        config._attn_implementation = attention
        models.append(getattr(transformers, f"{kind}ForConditionalGeneration")(config).to(DEVICE).eval())
    theirs, ours = models
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours.load_state_dict(theirs.state_dict())
    ids, mask, labels = make_ids(3, 13), make_mask("right", 3, 13), make_ids(3, 7)
    outs = [model(input_ids=ids, attention_mask=mask, labels=labels) for model in (theirs, ours)]
    assert len(calls) == 6, "two layers of the encoder, two of the decoder, and their two of cross attention"
    torch.testing.assert_close(outs[1].logits, outs[0].logits, rtol=1e-4, atol=1e-4)
    tables = []
    for out, model in zip(outs, models, strict=True):
        out.loss.backward()
        tables.append([p.grad for name, p in model.named_parameters() if "relative_attention_bias" in name])
    assert all(grad.abs().max() > 0 for grad in tables[0])
    torch.testing.assert_close(tables[1], tables[0], rtol=1e-4, atol=1e-5)
    written = [model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False) for model in models]
    assert torch.equal(*written)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(alibi, transformers):
    from flashbias.integrations.alibi import bloom

    config = transformers.BloomConfig(n_head=6)
    config._attn_implementation = alibi.NAME
    inputs, mask = torch.randn(2, 9, 48, device="cuda"), make_mask("left", 2, 9)
    query = torch.randn(2, 6, 9, 16, device="cuda", dtype=torch.float16)
    for warned in (False, True):  # compiled the first time
        torch.cuda.set_sync_debug_mode("error" if warned else "default")
        try:
            bloom.create_causal_mask(config, inputs, mask, None).attend(query, query, query, 0.25)
        finally:
            torch.cuda.set_sync_debug_mode("default")
