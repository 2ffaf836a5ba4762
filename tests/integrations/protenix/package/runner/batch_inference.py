"""The command line: it writes what it was asked for, and which code would compute it."""

import json
from pathlib import Path

import click
import torch
from protenix.model.triangular.triangular import TriangleAttention


@click.group()
def protenix_cli():
    pass


@protenix_cli.command("pred")
@click.option("-i", "--input", required=True)
@click.option("-o", "--out_dir", default="./output", help="Output directory.")
@click.option("-s", "--seeds", default="101")
@click.option("--use_msa", type=bool, default=True)
@click.option("--triatt_kernel", default="cuequivariance")
def predict(**options):
    if options["input"] == "nothing":
        raise RuntimeError("input file nothing does not exist")
    TriangleAttention(8, 8, 1)(torch.ones(3, 3, 8))
    out = Path(options["out_dir"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(options | {"attention": TriangleAttention.forward.__module__}))
    print("predicted")
