"""Local atom attention, against the host's own on the same weights."""

import copy

import pytest
import torch

from flashbias.testing import assert_as_accurate

from .conftest import DEVICE, give_structure

C, C_Z = 32, 8


@pytest.fixture
def transformer(host):
    """Two blocks, of which the second sees what the first has left in padding, if anything."""
    return give_structure(host.transformer.AtomTransformer(c_atom=C, c_atompair=C_Z, n_blocks=2, n_heads=4))


def make_inputs(atoms, batch=(), shared=()):
    """Atoms, their conditioning, and pairs within windows."""
    windows = -(-atoms // 32)
    q, c = torch.randn(*batch, atoms, C, device=DEVICE), torch.randn(*shared, atoms, C, device=DEVICE)
    return q, c, torch.randn(*shared, windows, 32, 128, C_Z, device=DEVICE)


def run(transformer, q, c, z, autocast=False, **options):
    transformer = copy.deepcopy(transformer)
    q, z = (tensor.detach().clone().requires_grad_() for tensor in (q, z))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        out = transformer(q, c, z, **options)
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).sin().to(out.dtype))
    rows = q[..., 0].numel()
    used = {name: p.grad / rows**0.5 for name, p in transformer.named_parameters() if p.grad is not None}
    return {"out": out, "q": q.grad, "z": z.grad, **used}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("atoms", "batch", "shared"),
    [(7, (), ()), (32, (3,), (1,)), (33, (2,), (1,)), (64, (2,), (2,)), (100, (), ()), (161, (2, 3), (2, 1))],
)
def test_output_and_gradients_are_those_of_the_host(transformer, stock, calls, atoms, batch, shared, autocast):
    inputs = make_inputs(atoms, batch, shared)
    with stock():
        exact = run(transformer, *inputs)
        theirs = run(transformer, *inputs, autocast=True)
    ours = run(transformer, *inputs, autocast=autocast)
    assert len(calls) == 2
    assert ours.keys() == exact.keys()
    for name in exact:
        assert ours[name].shape == exact[name].shape
        assert ours[name].abs().max() > 0
        if autocast:
            assert_as_accurate(name, ours[name], theirs[name], exact[name], torch.bfloat16)
        else:
            scale = exact[name].abs().max()
            torch.testing.assert_close(ours[name] / scale, exact[name] / scale, rtol=0, atol=2e-5, msg=name)


def test_windows_are_views_and_samples_share_their_bias(transformer, calls):
    with torch.no_grad():
        transformer(*make_inputs(100, (5,), (1,)))
    for (query, key, value, bias), _ in calls:
        assert query.shape == (5, 4, 4, 32, 8)
        assert key.shape == value.shape == (5, 4, 4, 128, 8)
        assert bias.values.shape == (1, 4, 4, 32, 128)
        for tensor in (key, value):
            assert tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size() / 2


def test_what_lies_beyond_the_atoms_has_no_effect(transformer):
    q, c, z = make_inputs(70)
    with torch.no_grad():
        expected = transformer(q, c, z)
        z[0, :, :48] = 1e4  # keys before the first atom
        z[-1, :, 48 + 6 :] = -1e4  # keys behind the last
        z[-1, 6:] = 1e4  # queries behind it
        torch.testing.assert_close(transformer(q, c, z), expected)


@pytest.mark.parametrize("inplace_safe", [False, True])
def test_in_place_and_in_chunks_as_well(transformer, stock, inplace_safe):
    inputs = make_inputs(70, (2,), (1,))

    def apply():
        with torch.no_grad():
            return transformer(*copy.deepcopy(inputs), inplace_safe=inplace_safe, chunk_size=4)

    ours = apply()
    with stock():
        torch.testing.assert_close(ours, apply(), rtol=1e-4, atol=1e-5)


def test_a_representation_that_does_not_fit_is_the_hosts_to_refuse(transformer, calls):
    q, c, z = make_inputs(70)
    with torch.no_grad(), pytest.raises((AssertionError, RuntimeError)):
        transformer(q, c, z[..., :100, :])
    assert not calls


def test_other_methods_of_the_host_stay(transformer, calls, caplog):
    for block in transformer.diffusion_transformer.blocks:
        block.attention_pair_bias.attention.local_attention_method = "global_attention_with_bias"
    with torch.no_grad():
        transformer(*make_inputs(70))
    assert not calls
    assert "global_attention_with_bias" in caplog.text


def test_compiled_once_for_all_lengths(host):
    attention = give_structure(
        host.transformer.AttentionPairBias(has_s=False, n_heads=2, c_a=C, c_z=C_Z, cross_attention_mode=True)
    )
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for atoms in (70, 100):
            q, _, z = make_inputs(atoms)
            torch.testing.assert_close(
                compiled(q, None, z, n_queries=32, n_keys=128), attention(q, None, z, n_queries=32, n_keys=128)
            )
