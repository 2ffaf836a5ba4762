"""Pair-biased attention between tokens, against the host's own on the same weights."""

import copy

import pytest
import torch

from flashbias.testing import assert_as_accurate

from .conftest import DEVICE, give_structure


def make_attention(host, head_dim=24, heads=2, has_s=True):
    c_a = head_dim * heads
    attention = host.transformer.AttentionPairBias(
        has_s=has_s, create_offset_ln_z=not has_s, n_heads=heads, c_a=c_a, c_s=20, c_z=12
    )
    return give_structure(attention)


def make_inputs(n, c_a, batch=(), fused=False):
    z = torch.randn(*batch[:-1], *(1 for _ in batch[-1:]), n, n, 12, device=DEVICE)
    if fused:
        z = torch.nn.functional.layer_norm(z, (12,)).movedim(-1, -3).contiguous()
    return torch.randn(*batch, n, c_a, device=DEVICE), torch.randn(*batch, n, 20, device=DEVICE), z


def run(attention, a, s, z, autocast=False, **options):
    attention = copy.deepcopy(attention)
    a, z = (tensor.detach().clone().requires_grad_() for tensor in (a, z))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        out = attention(a, s if attention.has_s else None, z, **options)
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).sin().to(out.dtype))
    rows = a[..., 0].numel()
    used = {name: p.grad / rows**0.5 for name, p in attention.named_parameters() if p.grad is not None}
    return {"out": out, "a": a.grad, "z": z.grad, **used}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("n", "head_dim", "has_s", "batch", "fused"),
    [
        (12, 24, False, (), False),
        (16, 48, True, (3,), False),
        (37, 48, True, (3,), True),
        (64, 24, True, (2, 3), False),
        (100, 24, False, (), False),
    ],
)
def test_output_and_gradients_are_those_of_the_host(
    host, stock, calls, monkeypatch, n, head_dim, has_s, batch, fused, autocast
):
    # Convolutions are tf32 by default: gradients that differ by a rounding of fp32 may round to neighbours there.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    attention = make_attention(host, head_dim, has_s=has_s)
    inputs = make_inputs(n, 2 * head_dim, batch, fused)
    options = {"enable_efficient_fusion": fused}
    with stock():
        exact = run(attention, *inputs, **options)  # the host computes scores in fp32, whatever it is given
        theirs = run(attention, *inputs, autocast=True, **options)
    ours = run(attention, *inputs, autocast=autocast, **options)
    assert len(calls) == 1
    assert ours.keys() == exact.keys()
    for name in exact:
        assert ours[name].abs().max() > 0
        if autocast:
            assert_as_accurate(name, ours[name], theirs[name], exact[name], torch.bfloat16)
        else:
            # By norms, since single entries of two computations in fp32 are wrong by chance.
            eps = torch.finfo(torch.float32).eps
            assert (ours[name] - exact[name]).norm() <= 32 * eps * exact[name].norm().clamp(min=1.0), name


def test_samples_share_the_bias(host, calls):
    with torch.no_grad():
        make_attention(host)(*make_inputs(16, 48, (5,)))
    ((query, _, _, bias), _) = calls[0]
    assert query.shape == (5, 2, 16, 24)
    assert bias.values.shape == (1, 2, 16, 16)
