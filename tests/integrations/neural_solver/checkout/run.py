"""A stand-in for the entry point of Neural-Solver-Library."""

import argparse

parser = argparse.ArgumentParser()
parser.add_argument("--space_dim", type=int, default=2)
parser.add_argument("--epochs", type=int, default=5)
args = parser.parse_known_args()[0]
args.n_hidden, args.n_heads, args.n_layers, args.mlp_ratio, args.dropout = 16, 2, 2, 1, 0.0
args.fun_dim, args.out_dim = 0, 1

if __name__ == "__main__":
    from exp.exp_basic import Exp_Basic

    Exp_Basic(args).train()
