"""A stand-in for the module of that name in Microsoft's Swin-Transformer: a small SwinV2 with its names and arithmetic.

Names, signatures, parameters and buffers are those that checkpoints and callers know; the code is another.
`FLASHBIAS_SWIN_REPO` points the tests at a real checkout instead.
"""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional


def to_windows(image, side):
    """`(images, height, width, C)` as `(images * windows, side^2, C)`."""
    return image.unfold(1, side, side).unfold(2, side, side).flatten(0, 2).flatten(2).transpose(1, 2)


def from_windows(windows, side, height, width):
    rows, columns = height // side, width // side
    tiles = windows.unflatten(0, (-1, rows, columns)).unflatten(3, (side, side))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class WindowAttention(nn.Module):
    def __init__(
        self, dim, window_size, num_heads, qkv_bias=True, attn_drop=0.0, proj_drop=0.0, pretrained_window_size=(0, 0)
    ):
        super().__init__()
        self.dim, self.window_size, self.num_heads = dim, window_size, num_heads
        self.pretrained_window_size = pretrained_window_size
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)
        self.proj, self.softmax = nn.Linear(dim, dim), nn.Softmax(dim=-1)
        offsets = [torch.arange(1.0 - side, side) for side in window_size]
        sides = [known or side for known, side in zip(pretrained_window_size, window_size, strict=True)]
        ramps = [8 * offset / (side - 1) for offset, side in zip(offsets, sides, strict=True)]
        ramps = [ramp.sign() * torch.log2(1 + ramp.abs()) / 3 for ramp in ramps]
        self.register_buffer("relative_coords_table", torch.cartesian_prod(*ramps).view(1, *map(len, ramps), 2))
        places = torch.cartesian_prod(*map(torch.arange, window_size))
        steps = places[:, None] - places + torch.tensor(window_size) - 1
        self.register_buffer("relative_position_index", steps @ torch.tensor([len(offsets[1]), 1]))

    def forward(self, x, mask=None):
        tokens = self.window_size[0] * self.window_size[1]
        shift = None
        if self.q_bias is not None:
            shift = torch.cat([self.q_bias, self.v_bias * 0, self.v_bias])
        mixed = functional.linear(x, self.qkv.weight, shift)
        query, key, value = mixed.unflatten(-1, (3, self.num_heads, -1)).movedim((2, 3), (0, 2))
        cosine = functional.normalize(query, dim=-1) @ functional.normalize(key, dim=-1).mT
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        bias = 16 * table[self.relative_position_index].sigmoid()
        scores = cosine * self.logit_scale.clamp(max=math.log(100)).exp() + bias.movedim(-1, 0)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        out = self.attn_drop(self.softmax(scores)) @ value
        return self.proj_drop(self.proj(out.movedim(1, 2).reshape(-1, tokens, x.shape[-1])))


class SwinTransformerBlock(nn.Module):
    def __init__(self, dim, input_resolution, num_heads, window_size=7, shift_size=0, mlp_ratio=4.0, **options):
        super().__init__()
        self.input_resolution = input_resolution
        self.window_size, self.shift_size = window_size, shift_size
        if min(input_resolution) <= window_size:
            self.window_size, self.shift_size = min(input_resolution), 0
        known = options.pop("pretrained_window_size", 0)
        self.attn = WindowAttention(
            dim, (self.window_size,) * 2, num_heads, pretrained_window_size=(known, known), **options
        )
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.register_buffer("attn_mask", self.mask() if self.shift_size else None)

    def mask(self):
        """-100 between positions that the cyclic shift has brought together."""
        height, width = self.input_resolution
        region = torch.zeros(1, height, width, 1)
        edges = [(0, -self.window_size), (-self.window_size, -self.shift_size), (-self.shift_size, None)]
        for number, (rows, columns) in enumerate(itertools.product(edges, edges)):
            region[:, slice(*rows), slice(*columns)] = number
        ids = to_windows(region, self.window_size)
        return (ids != ids.mT).float() * -100

    def forward(self, x):
        height, width = self.input_resolution
        image = x.unflatten(1, (height, width)).roll((-self.shift_size,) * 2, (1, 2))
        windows = self.attn(to_windows(image, self.window_size), mask=self.attn_mask)
        image = from_windows(windows, self.window_size, height, width).roll((self.shift_size,) * 2, (1, 2))
        x = x + self.norm1(image.flatten(1, 2))
        return x + self.norm2(self.mlp(x))


class PatchMerging(nn.Module):
    def __init__(self, input_resolution, dim):
        super().__init__()
        self.input_resolution = input_resolution
        self.reduction, self.norm = nn.Linear(4 * dim, 2 * dim, bias=False), nn.LayerNorm(2 * dim)

    def forward(self, x):
        image = x.unflatten(1, self.input_resolution)
        return self.norm(self.reduction(to_windows(image, 2).flatten(1).unflatten(0, (len(x), -1))))


class BasicLayer(nn.Module):
    def __init__(self, dim, resolution, depth, heads, window, last):
        super().__init__()
        shifts = [window // 2 if i % 2 else 0 for i in range(depth)]
        self.blocks = nn.ModuleList(SwinTransformerBlock(dim, resolution, heads, window, shift) for shift in shifts)
        self.downsample = None if last else PatchMerging(resolution, dim)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class SwinTransformerV2(nn.Module):
    def __init__(
        self, img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads, window_size, drop_path_rate=0.0
    ):
        super().__init__()
        side = img_size // patch_size
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.layers = nn.ModuleList(
            BasicLayer(embed_dim << i, (side >> i, side >> i), depth, heads, window_size, i + 1 == len(depths))
            for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True))
        )
        width = embed_dim << (len(depths) - 1)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))
