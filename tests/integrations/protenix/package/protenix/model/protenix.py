"""The model: a trunk of triangle and pair-biased attention, a diffusion module, and heads, all very small."""

from itertools import pairwise

import torch
from torch import nn

from protenix.model.modules.primitives import Transition
from protenix.model.modules.transformer import AtomTransformer, AttentionPairBias, DiffusionTransformer
from protenix.model.triangular.triangular import TriangleAttention

C_S, C_Z = 16, 12


class PairformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_s = C_S
        self.tri_att_start, self.tri_att_end = TriangleAttention(C_Z, 8, 2), TriangleAttention(C_Z, 8, 2)
        self.attention_pair_bias = AttentionPairBias(has_s=False, create_offset_ln_z=True, n_heads=2, c_a=C_S, c_z=C_Z)
        self.pair_transition = Transition(C_Z, 2)

    def forward(
        self,
        s,
        z,
        pair_mask,
        triangle_multiplicative="torch",
        triangle_attention="torch",
        inplace_safe=False,
        chunk_size=None,
    ):
        for attention in (self.tri_att_start, self.tri_att_end):
            z = z + attention(z, pair_mask, chunk_size, triangle_attention)
            z = z.transpose(-2, -3).contiguous()
        z = z + self.pair_transition(z)
        return s + self.attention_pair_bias(s, None, z), z


class PairformerStack(nn.Module):
    def __init__(self, n_blocks):
        super().__init__()
        self.blocks = nn.ModuleList(PairformerBlock() for _ in range(n_blocks))


class DiffusionModule(nn.Module):
    def __init__(self, transformer):
        super().__init__()
        self.diffusion_transformer = DiffusionTransformer(c_a=C_S, c_s=C_S, c_z=C_Z, n_heads=2, **transformer)
        self.atoms = AtomTransformer(c_atom=8, c_atompair=4, n_blocks=1, n_heads=2)
        self.into, self.spread, self.out = nn.Linear(3, C_S), nn.Linear(C_S, 8), nn.Linear(8, 3)

    def forward(self, x_noisy, t_hat_noise_level, input_feature_dict, s_trunk, pair_z, p_lm, **others):
        scale = 1 + t_hat_noise_level[..., None, None]
        of_atom = input_feature_dict["atom_to_token_idx"]
        a = torch.zeros(*x_noisy.shape[:-2], len(s_trunk), C_S).index_add(-2, of_atom, self.into(x_noisy / scale))
        a = self.diffusion_transformer(a, s_trunk, pair_z)
        q = self.spread(a[..., of_atom, :])
        return x_noisy / scale + self.out(self.atoms(q, q[:1] * 0, p_lm))


class Protenix(nn.Module):
    def __init__(self, configs):
        super().__init__()
        self.configs, self.N_cycle = configs, configs.model.N_cycle
        self.of_residue, self.of_pair = nn.Linear(32, C_S), nn.Linear(1, C_Z)
        self.pairformer_stack = PairformerStack(**configs.model.pairformer)
        self.diffusion_module = DiffusionModule(**configs.model.diffusion_module)
        self.of_atoms = nn.Linear(1, 4)
        self.distogram_head, self.confidence_head = nn.Linear(C_Z, 8), nn.Linear(C_S, 1)
        for block in self.pairformer_stack.blocks:
            nn.init.zeros_(block.tri_att_start.mha.linear_o.weight)

    def get_pairformer_output(self, input_feature_dict, N_cycle, chunk_size=None):
        s = self.of_residue(input_feature_dict["restype"])
        index = input_feature_dict["residue_index"].float()
        z = self.of_pair(torch.sin(index[:, None, None] - index[None, :, None]))
        for _ in range(N_cycle):
            for block in self.pairformer_stack.blocks:
                s, z = block(s, z, None, triangle_attention=self.configs.triangle_attention, chunk_size=chunk_size)
        return s, s, z

    def sample_diffusion(self, **kwargs):
        schedule, feats = kwargs.pop("noise_schedule"), kwargs["input_feature_dict"]
        denoise, n_sample = kwargs.pop("denoise_net"), kwargs.pop("N_sample")
        x = schedule[0] * torch.randn(n_sample, feats["atom_to_token_idx"].shape[-1], 3, device=schedule.device)
        for noise, next_noise in pairwise(schedule):
            denoised = denoise(x_noisy=x, t_hat_noise_level=noise.expand(n_sample), **kwargs)
            x = x + (next_noise - noise) * (x - denoised) / noise
        return x

    def run_confidence_head(self, s, atoms):
        return self.confidence_head(s)[atoms].squeeze(-1).sigmoid()

    def forward(self, input_feature_dict, label_full_dict, label_dict, mode="inference", mc_dropout_apply_rate=0.4):
        tokens = len(input_feature_dict.pop("token_index"))
        atoms = input_feature_dict["atom_to_token_idx"]
        thresholds = self.configs.infer_setting.chunk_size_thresholds.items()
        chunk = next((rows for limit, rows in thresholds if tokens <= int(limit)), 32)
        s_inputs, s, z = self.get_pairformer_output(input_feature_dict, self.N_cycle, None if chunk == -1 else chunk)
        sizes = self.configs.sample_diffusion
        with torch.autocast(s.device.type, enabled=False):
            near = torch.linspace(-1, 1, 32 * 128).view(1, 1, 32, 128, 1).expand(1, -(-len(atoms) // 32), -1, -1, -1)
            x = self.sample_diffusion(
                denoise_net=self.diffusion_module,
                input_feature_dict=input_feature_dict,
                s_inputs=s_inputs,
                s_trunk=s.float(),
                pair_z=z.float()[None],
                p_lm=self.of_atoms(near),
                N_sample=sizes.N_sample,
                noise_schedule=torch.linspace(4, 0.5, sizes.N_step + 1, device=s.device),
            )
        plddt, _ = self.run_confidence_head(s.float(), atoms), self.distogram_head(z)
        made = {"coordinate": x}
        made["full_data"] = [{"atom_plddt": plddt[None]} for _ in x]
        made["summary_confidence"] = [{"ptm": plddt.mean()[None]} for _ in x]
        return made, {}, {}
