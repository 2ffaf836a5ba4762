"""A stand-in for the module of Neural-Solver-Library: the same names, shapes and casts."""

import torch
from layers.flash_bias_triton import flash_bias_func
from torch import nn


class Spatial_Bias_Attention(nn.Module):
    def __init__(self, dim, heads=8, dim_head=64, dropout=0.0, **kwargs):
        super().__init__()
        self.heads, self.dim_head, self.scale = heads, dim_head, dim_head**-0.5
        self.dropout = nn.Dropout(dropout)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, heads * dim_head, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))
        self.pos_weight = nn.Linear(dim_head, 1, bias=False)

    def forward(self, x, q_bias, k_bias):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        weight = self.pos_weight(x.unflatten(-1, (self.heads, -1)))
        many = (1, 1, self.heads, 1)
        factors = (weight * q_bias.repeat(many)).half(), k_bias.repeat(many).half()
        out = flash_bias_func(q.half(), k.half(), v.half(), *factors, None, False, self.scale)
        return self.to_out(out.float().flatten(2))


class MLP(nn.Module):
    def __init__(self, n_input, n_hidden, n_output):
        super().__init__()
        self.linear_pre = nn.Sequential(nn.Linear(n_input, n_hidden), nn.GELU())
        self.linear_post = nn.Linear(n_hidden, n_output)

    def forward(self, x):
        return self.linear_post(self.linear_pre(x))


class Transformer_block(nn.Module):
    def __init__(self, args, last):
        super().__init__()
        dim = args.n_hidden
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.Attn = Spatial_Bias_Attention(dim, args.n_heads, dim // args.n_heads, args.dropout)
        self.mlp = MLP(dim, dim * args.mlp_ratio, dim)
        self.last = last
        if last:
            self.ln_3, self.mlp2 = nn.LayerNorm(dim), nn.Linear(dim, args.out_dim)

    def forward(self, fx, q_bias, k_bias):
        fx = self.Attn(self.ln_1(fx), q_bias, k_bias) + fx
        fx = self.mlp(self.ln_2(fx)) + fx
        return self.mlp2(self.ln_3(fx)) if self.last else fx


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.preprocess = MLP(args.fun_dim + args.space_dim, args.n_hidden * 2, args.n_hidden)
        self.blocks = nn.ModuleList(Transformer_block(args, i == args.n_layers - 1) for i in range(args.n_layers))
        self.placeholder = nn.Parameter(torch.rand(args.n_hidden) / args.n_hidden)

    def get_matrix(self, original_pos):
        if original_pos.shape[-1] == 2:
            x, y = original_pos.unbind(-1)
            r, phi = torch.sqrt(x**2 + y**2), torch.atan2(y, x)
            back = torch.stack((r * torch.cos(phi), r * torch.sin(phi)), -1)
        else:
            x, y, z = original_pos.unbind(-1)
            r = torch.sqrt(x**2 + y**2 + z**2 + 1e-8)
            theta, phi = torch.acos(torch.clamp(z / r, -1.0, 1.0)), torch.atan2(y, x)
            back = torch.stack(
                (r * torch.sin(theta) * torch.cos(phi), r * torch.sin(theta) * torch.sin(phi), r * torch.cos(theta)), -1
            )
        square, one = -(r[..., None] ** 2), torch.ones_like(r[..., None]).cuda()
        q_bias, k_bias = torch.cat((2 * back, square, one), -1), torch.cat((back, one, square), -1)
        return q_bias[:, :, None], k_bias[:, :, None]

    def forward(self, x, fx, T=None, geo=None):
        q_bias, k_bias = self.get_matrix(x)
        fx = self.preprocess(x if fx is None else torch.cat((x, fx), -1)) + self.placeholder
        for block in self.blocks:
            fx = block(fx, q_bias, k_bias)
        return fx
