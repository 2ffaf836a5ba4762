"""A stand-in for the module of Neural-Solver-Library: it moves everything to the GPU, whether there is one or not."""

import torch
from models.Transformer_Spatial_Bias import Model


class Exp_Basic:
    def __init__(self, args):
        torch.manual_seed(0)
        self.args = args
        self.model = Model(args).cuda()

    def train(self):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        points = torch.rand(2, 30, self.args.space_dim).cuda()
        wanted = points.square().sum(-1, keepdim=True)
        for epoch in range(self.args.epochs):
            loss = (self.model(points, None) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"Epoch {epoch} Train loss : {loss.item():.5f}")
