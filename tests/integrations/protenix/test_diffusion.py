"""The diffusion transformer's biases: made once in `sample_diffusion`, freed when it ends."""

import gc
import weakref
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from flashbias.integrations.choice import ConfigurationError

from .conftest import DEVICE, give_structure

N, BLOCKS, STEPS, SAMPLES = 13, 3, 4, 5
BYTES_OF_A_BIAS = 2 * 13 * 16 * 4  # heads, rows, columns with padding, fp32


class Options(dict):
    """As much of a configuration as sampling reads."""

    __getattr__ = dict.__getitem__
    to_dict = dict.copy


class Denoiser(nn.Module):
    """A token transformer that moves one atom for each token."""

    def __init__(self, host):
        super().__init__()
        self.diffusion_transformer = host.transformer.DiffusionTransformer(
            c_a=16, c_s=16, c_z=12, n_blocks=BLOCKS, n_heads=2
        )
        self.into, self.out = nn.Linear(3, 16), nn.Linear(16, 3)
        self.steps, self.fail_at = 0, None

    def forward(self, x_noisy, t_hat_noise_level, s_trunk, pair_z, enable_efficient_fusion=False, **others):
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("out of luck")
        scale = t_hat_noise_level[..., None, None]
        z = pair_z
        if enable_efficient_fusion:
            z = nn.functional.layer_norm(z, z.shape[-1:]).movedim(-1, -3).contiguous()
        a = self.into(x_noisy / (1 + scale))
        a = self.diffusion_transformer(a, s_trunk, z, enable_efficient_fusion=enable_efficient_fusion)
        return x_noisy / (1 + scale) + self.out(a)


@pytest.fixture
def denoiser(host):
    return give_structure(Denoiser(host)).eval()


@pytest.fixture
def model(host):
    """A `Protenix` with nothing but what `sample_diffusion` reads."""
    made = host.model.Protenix.__new__(host.model.Protenix)
    nn.Module.__init__(made)
    made.configs = SimpleNamespace(
        sample_diffusion=Options(gamma0=0.0, gamma_min=1.0, noise_scale_lambda=1.0, step_scale_eta=1.0, guidance=None),
        infer_setting=Options(chunk_size=None, sample_diffusion_chunk_size=2),
        skip_amp=Options(sample_diffusion=True),
    )
    if hasattr(host.model, "parse_tfg_config"):
        made.configs.sample_diffusion["guidance"] = {"enable": False}
    return made.eval()


@pytest.fixture
def sample(model, denoiser):
    """`sample()`: coordinates from the same noise in every call."""
    torch.manual_seed(0)
    arguments = {
        "input_feature_dict": {"atom_to_token_idx": torch.arange(N, device=DEVICE)},
        "s_inputs": torch.randn(N, 8, device=DEVICE),
        "s_trunk": torch.randn(1, N, 16, device=DEVICE),
        "z_trunk": None,
        "pair_z": torch.randn(1, N, N, 12, device=DEVICE),
        "p_lm": None,
        "c_l": None,
        "N_sample": SAMPLES,
        "noise_schedule": torch.linspace(4, 0.5, STEPS + 1, device=DEVICE),
    }

    def run(**others):
        torch.manual_seed(1)
        numpy.random.seed(1)  # of rotations
        denoiser.steps = 0
        with torch.no_grad():
            return model.sample_diffusion(**({"denoise_net": denoiser} | arguments | others))

    return run


@pytest.fixture
def made(denoiser, monkeypatch):
    """References to the biases that have been made: what each block's projection of z returned."""
    biases = []
    for block in denoiser.diffusion_transformer.blocks:
        attention = block.attention_pair_bias
        attention.linear_nobias_z.register_forward_hook(lambda *args: biases.append(weakref.ref(args[-1])))
    return biases


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_samples_are_those_of_the_host(sample, stock, fused):
    ours = sample(enable_efficient_fusion=fused)
    with stock():
        theirs = sample(enable_efficient_fusion=fused)
    assert ours.shape == (SAMPLES, N, 3)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_each_block_makes_its_bias_once(sample, denoiser, made, calls):
    sample()
    assert len(made) == BLOCKS
    assert denoiser.steps >= STEPS
    assert len(calls) == BLOCKS * denoiser.steps
    values = {id(args[3].values) for args, _ in calls}
    assert len(values) == BLOCKS


class AtomDenoiser(Denoiser):
    """One with local attention between atoms behind that between tokens."""

    def __init__(self, host):
        super().__init__(host)
        self.atoms = host.transformer.AtomTransformer(c_atom=3, c_atompair=8, n_blocks=2, n_heads=1)

    def forward(self, p_lm, inplace_safe=False, **others):
        x = super().forward(**others)
        return self.atoms(x, x[:1], p_lm, inplace_safe=inplace_safe)


def test_local_attention_makes_its_biases_once_too(host, sample, stock, calls):
    denoiser = give_structure(AtomDenoiser(host)).eval()
    others = {"denoise_net": denoiser, "p_lm": torch.randn(1, 1, 32, 128, 8, device=DEVICE)}
    ours = sample(**others)
    assert len(calls) == (BLOCKS + 2) * denoiser.steps
    assert len({id(args[3].values) for args, _ in calls}) == BLOCKS + 2
    with stock():
        torch.testing.assert_close(ours, sample(**others), rtol=1e-4, atol=1e-4)


class NormalizingDenoiser(Denoiser):
    """One that normalises pairs for its token transformer, as `DiffusionModule` does; notes how many."""

    def __init__(self, host):
        super().__init__(host)
        self.normalize = nn.LayerNorm(12, elementwise_affine=False)
        self.pairs = []

    def forward(self, pair_z, x_noisy, t_hat_noise_level, s_trunk, enable_efficient_fusion=False, **others):
        z = self.normalize(pair_z).movedim(-1, -3).contiguous()
        self.pairs.append(z[0, 0].numel())
        scale = t_hat_noise_level[..., None, None]
        a = self.diffusion_transformer(self.into(x_noisy / (1 + scale)), s_trunk, z, enable_efficient_fusion=True)
        return x_noisy / (1 + scale) + self.out(a)


@pytest.fixture
def normalizing(host):
    return give_structure(NormalizingDenoiser(host)).eval()


def test_pairs_that_nothing_reads_are_not_normalised(sample, normalizing, stock):
    ours = sample(denoise_net=normalizing)
    assert normalizing.pairs == [N * N] + [1] * (len(normalizing.pairs) - 1)
    assert len(normalizing.pairs) > 1
    assert not normalizing.normalize._forward_pre_hooks
    normalizing.pairs.clear()
    with stock():
        torch.testing.assert_close(ours, sample(denoise_net=normalizing), rtol=1e-4, atol=1e-4)
    assert set(normalizing.pairs) == {N * N}


@pytest.mark.parametrize("reader", ["a block whose bias is not kept", "a block that is the host's", "a verified run"])
def test_pairs_are_there_where_something_reads_them(protenix, sample, normalizing, stock, monkeypatch, reader):
    if reader == "a block whose bias is not kept":
        protenix.configure(bias_cache_gb=1.5 * BYTES_OF_A_BIAS / 1e9)
    elif reader == "a block that is the host's":
        block = normalizing.diffusion_transformer.blocks[1]
        block.attention_pair_bias.attention.register_forward_hook(lambda *args: None)
    else:
        monkeypatch.setenv("FLASHBIAS_VERIFY", "1")
    ours = sample(denoise_net=normalizing)
    assert set(normalizing.pairs) == {N * N}
    with stock():
        torch.testing.assert_close(ours, sample(denoise_net=normalizing), rtol=1e-4, atol=1e-4)


def test_another_target_gets_other_biases(sample, stock):
    sample()
    other = {"pair_z": torch.randn(1, N + 3, N + 3, 12, device=DEVICE), "s_inputs": torch.randn(N + 3, 8)}
    other |= {"input_feature_dict": {"atom_to_token_idx": torch.arange(N + 3, device=DEVICE)}}
    other |= {"s_inputs": torch.randn(N + 3, 8, device=DEVICE), "s_trunk": torch.randn(1, N + 3, 16, device=DEVICE)}
    ours = sample(**other)
    with stock():
        torch.testing.assert_close(ours, sample(**other), rtol=1e-4, atol=1e-4)


def references(calls):
    found = [weakref.ref(args[3].values) for args, _ in calls]
    calls.clear()
    gc.collect()
    return found


def test_biases_are_freed_at_the_end(sample, calls):
    sample()
    found = references(calls)
    assert found
    assert not any(reference() is not None for reference in found)


def test_biases_are_freed_when_an_exception_passes(sample, denoiser, calls, made):
    denoiser.fail_at = 3
    with pytest.raises(RuntimeError, match="out of luck"):
        sample()
    found = references(calls)
    assert found
    assert not any(reference() is not None for reference in found)
    made.clear()
    denoiser.fail_at = None
    sample()
    assert len(made) == BLOCKS


@pytest.mark.parametrize("kept", range(BLOCKS + 1))
def test_beyond_the_budget_blocks_make_their_bias_in_every_step(protenix, sample, denoiser, stock, made, caplog, kept):
    protenix.configure(bias_cache_gb=(kept + 0.5) * BYTES_OF_A_BIAS / 1e9)
    ours = sample()
    assert len(made) == kept + (BLOCKS - kept) * denoiser.steps
    assert ("bias_cache_gb is too small" in caplog.text) == (kept < BLOCKS)
    with stock():
        torch.testing.assert_close(ours, sample(), rtol=1e-4, atol=1e-4)


def test_no_budget_keeps_nothing(protenix, sample, denoiser, made, caplog):
    protenix.configure(bias_cache_gb=0)
    sample()
    assert len(made) == BLOCKS * denoiser.steps
    assert "too small" not in caplog.text


@pytest.mark.parametrize("amount", [-1, float("nan")])
def test_impossible_budget_is_refused(protenix, amount):
    with pytest.raises(ConfigurationError, match="bias_cache_gb"):
        protenix.configure(bias_cache_gb=amount)


def test_nothing_is_kept_in_training(sample, model, denoiser, made):
    model.train()
    sample()
    assert len(made) == BLOCKS * denoiser.steps


def test_nothing_is_kept_outside_of_sampling(denoiser, made):
    a, s, z = torch.randn(2, N, 16), torch.randn(1, N, 16), torch.randn(1, N, N, 12)
    with torch.no_grad():
        for _ in range(2):
            denoiser.diffusion_transformer(a.to(DEVICE), s.to(DEVICE), z.to(DEVICE))
    assert len(made) == 2 * BLOCKS


def test_guidance_may_differentiate_a_step(sample, denoiser, stock, monkeypatch):
    def guided(*args, forward=denoiser.forward, **kwargs):
        with torch.enable_grad():
            x = kwargs["x_noisy"].detach().requires_grad_()
            denoised = forward(**{**kwargs, "x_noisy": x})
            (slope,) = torch.autograd.grad(denoised.square().sum(), x)
        return denoised.detach() - 0.01 * slope

    monkeypatch.setattr(denoiser, "forward", guided)
    ours = sample()
    with stock():
        torch.testing.assert_close(ours, sample(), rtol=1e-3, atol=1e-3)
