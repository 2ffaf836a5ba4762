"""The sampler's entrance."""

from itertools import pairwise

import torch
from torch import nn

from protenix.model.modules.transformer import DiffusionTransformer  # noqa: F401
from protenix.model.triangular.triangular import TriangleAttention  # noqa: F401


class Protenix(nn.Module):
    def sample_diffusion(self, **kwargs):
        schedule, feats = kwargs.pop("noise_schedule"), kwargs["input_feature_dict"]
        denoise, n_sample = kwargs.pop("denoise_net"), kwargs.pop("N_sample")
        x = schedule[0] * torch.randn(n_sample, feats["atom_to_token_idx"].shape[-1], 3, device=schedule.device)
        for noise, next_noise in pairwise(schedule):
            denoised = denoise(x_noisy=x, t_hat_noise_level=noise.expand(n_sample), **kwargs)
            x = x + (next_noise - noise) * (x - denoised) / noise
        return x
