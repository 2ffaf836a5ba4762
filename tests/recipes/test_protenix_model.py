"""The whole model, patched against the torch kernel, forward and in a training step.

On a stand-in, or on the real package of `FLASHBIAS_PROTENIX_PATH`, whose model has an MSA module, templates and a
confidence head as well.
"""

import contextlib
import copy
import importlib
import io

import pytest
import torch

from flashbias.integrations import protenix as ours
from flashbias.recipes.protenix import features, whole

from .test_protenix_whole import built, package  # noqa: F401 - fixtures

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # by Protenix


@pytest.mark.parametrize(("tokens", "chunk"), [(12, None), (16, 4), (27, None), (27, 13)])
def test_a_run_gives_what_the_torch_kernel_gives(built, tokens, chunk):  # noqa: F811
    """Up to 16 tokens, where Protenix' default kernel forgets to scale, and with a last chunk of one row."""
    target, size = features.load(tokens=tokens), whole.Size(2, 2, 3)
    theirs = whole.run(built, target, whole.Variant("torch", "fp32", chunk), size, "cpu")
    result = whole.run(built, target, whole.Variant(whole.OURS, "fp32", chunk), size, "cpu")
    scale = float(theirs.coordinates.abs().max())
    found = whole.differences(result, theirs)
    assert 0 <= found["rmsd_max"] < 1e-5 * scale
    assert found["plddt"] < 1e-3
    assert found["ptm"] < 1e-5
    assert found["distogram"] < 1e-3  # it is kept in half precision


def test_default_names_of_kernels_need_no_package(built, monkeypatch):  # noqa: F811
    """cuEquivariance's names, which are the default, without cuEquivariance."""
    target, size = features.load(tokens=12), whole.Size(1, 2, 1)
    theirs = whole.run(built, target, whole.Variant("torch", "fp32"), size, "cpu")
    ours.apply()
    built.configs.triangle_attention = built.configs.triangle_multiplicative = "cuequivariance"
    monkeypatch.setattr(whole, "computed_by", lambda variant, host, device: contextlib.nullcontext())
    result = whole.run(built, target, whole.Variant(whole.OURS, "fp32"), size, "cpu")
    assert whole.differences(result, theirs)["rmsd_max"] < 1e-5 * float(theirs.coordinates.abs().max())


def test_a_training_step_gives_the_gradients_of_the_torch_kernel(built):  # noqa: F811
    target = features.load(tokens=20)

    def step():
        model = copy.deepcopy(built.model).train()
        for module in model.modules():
            for name in {"p_drop", "drop_prob"} & set(vars(module)):
                setattr(module, name, 0.0)
            if isinstance(module, torch.nn.Dropout) or "p" in vars(module):
                module.p = 0.0
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            loss = train(model, copy.deepcopy(target))
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    theirs = step()
    ours.apply()
    result = step()
    assert result.keys() == theirs.keys()
    assert any("tri_att" in name for name in result)
    assert any("linear_nobias_z" in name for name in result)
    total = sum(g.square().sum() for g in theirs.values()).sqrt()
    difference = sum((result[name] - theirs[name]).square().sum() for name in theirs).sqrt()
    assert total > 0
    assert difference < 1e-4 * total


def train(model, target):
    """A loss of the pair representation and of denoised coordinates."""
    host = importlib.import_module("protenix.model.protenix")
    x = 4 * torch.randn(2, len(target["atom_to_token_idx"]), 3)
    noise = torch.tensor([3.0, 5.0])
    if hasattr(host, "update_input_feature_dict"):
        target = host.update_input_feature_dict(model.relative_position_encoding.generate_relp(target))
        s_inputs, s, z = model.get_pairformer_output(input_feature_dict=target, N_cycle=1, inplace_safe=False)
        shared = {"s_inputs": s_inputs, "s_trunk": s, "z_trunk": z, "pair_z": None, "p_lm": None, "c_l": None}
    else:
        _, s, z = model.get_pairformer_output(target, 1)
        near = torch.linspace(-1, 1, 32 * 128).view(1, 1, 32, 128, 1).expand(1, -(-x.shape[-2] // 32), -1, -1, -1)
        shared = {"s_trunk": s, "pair_z": z[None], "p_lm": model.of_atoms(near)}
    made = model.diffusion_module(x_noisy=x, t_hat_noise_level=noise, input_feature_dict=target, **shared)
    return sum((t * torch.linspace(-1, 1, t.numel()).view_as(t).sin()).mean() for t in (made, z))
