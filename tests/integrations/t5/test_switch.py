"""What is served and what is not, and what goes to the host's own code."""

import pytest
import torch
from prompts import DEVICE, make_ids, make_mask

from flashbias.integrations import verify

from .conftest import HOSTS, LAYERS

every_host = pytest.mark.parametrize("kind", HOSTS)


def logits_of(model, ids, mask=None, **options):
    return model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, 3:], **options).logits


@every_host
def test_revert_gives_the_host_its_own_functions_back(t5, make_model, calls, kind):
    model, ids = make_model(kind), make_ids(1, 9)
    cls = next(type(module) for module in model.modules() if type(module).__name__ == f"{kind}Attention")
    assert cls.forward.__module__.startswith("flashbias.")
    assert t5.revert() is True
    assert not t5.is_applied()
    assert cls.forward.__module__ == cls.__module__
    assert not hasattr(cls, "forward_before_flashbias")
    logits_of(model, ids)
    assert not calls
    assert t5.apply() is True
    assert t5.apply() is False
    logits_of(model, ids)
    assert len(calls) == 3 * LAYERS
    assert all(host.ok and host.patched for host in t5.INTEGRATION.status())
    t5.configure()


@pytest.mark.parametrize("kind", ["T5", "MT5"])  # UMT5 of transformers 4 returns no weights
def test_weights_that_somebody_wants_to_see(make_model, calls, caplog, kind):
    model, ids, mask = make_model(kind), make_ids(2, 9), make_mask("right", 2, 9)
    ours = logits_of(model, ids, mask)
    made = len(calls)
    theirs = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, 3:], output_attentions=True)
    assert len(calls) == made
    assert [weights.shape for weights in theirs.encoder_attentions] == [(2, 4, 9, 9)] * LAYERS
    assert [weights.shape for weights in theirs.cross_attentions] == [(2, 4, 6, 9)] * LAYERS
    assert caplog.text.count("output_attentions is not covered") == 1
    torch.testing.assert_close(ours, theirs.logits, rtol=1e-4, atol=1e-4)


@every_host
def test_attention_dropout_in_training(make_model, stock, calls, caplog, kind):
    model, ids, mask = make_model(kind, dropout_rate=0.1).train(), make_ids(2, 9), make_mask("right", 2, 9)

    def run():
        torch.manual_seed(0)
        return logits_of(model, ids, mask)

    ours = run()
    assert not calls
    assert caplog.text.count("attention dropout in training is not covered") == 1
    with stock():
        torch.testing.assert_close(ours, run(), rtol=1e-5, atol=1e-5)
    logits_of(model.eval(), ids)
    assert len(calls) == 3 * LAYERS


@every_host
def test_masks_of_four_dimensions_are_left_to_the_host(make_model, calls, caplog, kind):
    """Of the decoder; the encoder and cross attention are served all the same."""
    model, ids = make_model(kind), make_ids(2, 9)
    allowed = torch.ones(2, 1, 6, 6, device=DEVICE, dtype=torch.bool).tril()
    numbers = torch.zeros(allowed.shape, device=DEVICE).masked_fill(~allowed, torch.finfo(torch.float32).min)
    ours = logits_of(model, ids, decoder_attention_mask=numbers)
    assert len(calls) == 2 * LAYERS
    assert caplog.text.count("other than two dimensions") == 1
    torch.testing.assert_close(ours, logits_of(model, ids), rtol=1e-4, atol=1e-4)


def test_head_masks_are_left_to_the_host(make_model, stock, calls, caplog, transformers):
    if not transformers.__version__.startswith("4"):
        pytest.skip("transformers 5 has no head masks")
    model, ids = make_model("T5"), make_ids(2, 9)
    heads = torch.tensor([[1.0, 0, 1, 1], [0, 1, 1, 1]], device=DEVICE)
    options = {"head_mask": heads, "decoder_head_mask": heads}
    ours = logits_of(model, ids, **options)
    assert len(calls) == LAYERS, "cross attention only"
    assert caplog.text.count("a head mask is not covered") == 1
    with stock():
        torch.testing.assert_close(ours, logits_of(model, ids, **options), rtol=1e-4, atol=1e-4)


@every_host
def test_verified_run_leaves_the_cache_alone(make_model, monkeypatch, kind):
    monkeypatch.setenv("FLASHBIAS_VERIFY", "1")
    model, ids = make_model(kind), make_ids(2, 29)

    def write():
        with torch.no_grad():
            return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)

    out = write()
    monkeypatch.delenv("FLASHBIAS_VERIFY")
    assert torch.equal(out, write())
    rows = verify.differences()
    assert [row.calls for row in rows] == [1] * LAYERS + [4] * 2 * LAYERS
    assert all(row.difference < 1e-4 < row.largest for row in rows)
