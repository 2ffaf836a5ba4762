"""Protenix itself, for recipes: its model without its data pipeline, with a checkpoint or with random weights."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from flashbias.errors import FlashBiasError

MODEL = "protenix_base_default_v1.0.0"
STD = 0.02  # of matrices that a fresh model has at zero


class ModelError(FlashBiasError, RuntimeError):
    """Protenix, or its checkpoint, cannot be loaded."""


@dataclass
class Host:
    """A model ready for inference.

    weights: what they are, for the table. stand_ins: packages that Protenix imports and that were not there.
    """

    model: Any
    weights: str
    stand_ins: str

    @property
    def configs(self) -> Any:
        """Of the model, which reads most of them anew in every call."""
        return self.model.configs


def build(device: str, checkpoint: Path | None = None, blocks: int | None = None, seed: int = 0) -> Host:
    """The base model as `protenix pred` configures it.

    Without a checkpoint weights are random, and matrices that start at zero are drawn anew: at zero they would keep
    every bias from having an effect. With `blocks`, each stack has so many only: for a dry run.
    Raises `ModelError`.
    """
    import torch

    # Protenix' own layer norm is compiled at import, by a CUDA compiler.
    os.environ.setdefault("LAYERNORM_TYPE", "torch")
    with stand_ins() as missing:
        try:
            configs = configurations()
            protenix = importlib.import_module("protenix.model.protenix").Protenix
        except ImportError as error:
            raise ModelError(
                f"Protenix cannot be imported: {error}",
                "protenix >= 1.0.0, < 3 with its dependencies",
                "pip install protenix",
            ) from error
    if blocks is not None:
        for stack in ("pairformer", "msa_module", "template_embedder", "confidence_head"):
            configs.model[stack].n_blocks = blocks
        configs.model.diffusion_module.transformer.n_blocks = blocks
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()), _drawn_by_torch():
        model = protenix(configs).eval()
    if checkpoint is not None:
        _load(model, checkpoint)
        weights = checkpoint.name
    else:
        redrawn = _redraw_zeros(model)
        weights = f"random, {redrawn} zero matrices drawn anew with std {STD}"
    return Host(model.to(device), weights, ", ".join(missing))


def configurations() -> Any:
    """Those of `protenix pred` for the base model and up to 2,560 tokens, with the torch kernels."""
    parse = importlib.import_module("protenix.config.config").parse_configs
    parts = {name: importlib.import_module(f"configs.configs_{name}") for name in ("base", "data", "inference")}
    models = importlib.import_module("configs.configs_model_type").model_configs
    merged = {**parts["base"].configs, "data": parts["data"].data_configs, **parts["inference"].inference_configs}
    configs = parse(merged, fill_required_with_null=True)
    configs.update(importlib.import_module("ml_collections").ConfigDict(models[MODEL]))
    configs.triangle_attention = configs.triangle_multiplicative = "torch"
    configs.skip_amp.sample_diffusion = configs.skip_amp.confidence_head = True
    return configs


@contextlib.contextmanager
def _drawn_by_torch() -> Iterator[None]:
    """Inside, torch draws initial weights in scipy's place: as these are distributed, in seconds, and by its seed."""
    import torch

    layers: Any = importlib.import_module("protenix.model.triangular.layers")
    scipys = getattr(layers, "truncnorm", None)

    def rvs(a: float, b: float, loc: float, scale: float, size: int) -> Any:
        drawn = torch.nn.init.trunc_normal_(torch.empty(size), loc, scale, loc + a * scale, loc + b * scale)
        return drawn.numpy()

    if scipys is not None:
        layers.truncnorm = SimpleNamespace(std=scipys.std, rvs=rvs)
    try:
        yield
    finally:
        if scipys is not None:
            layers.truncnorm = scipys


def _load(model: Any, checkpoint: Path) -> None:
    import torch

    try:
        stored = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
        model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in stored.items()})
    except Exception as error:
        raise ModelError(
            f"the checkpoint {checkpoint}: {type(error).__name__}: {error}",
            f"a file with the weights of {MODEL} under 'model'",
            "download it with Protenix, or leave the option out for random weights",
        ) from error


def _redraw_zeros(model: Any) -> int:
    """Draw the matrices that are zero anew; returns how many."""
    import torch

    zero = [p for p in model.parameters() if p.dim() > 1 and not p.any()]
    with torch.no_grad():
        for parameter in zero:
            parameter.normal_(std=STD)
    return len(zero)


def redraw(model: Any, seed: int) -> None:
    """Draw all matrices anew, each with the standard deviation that it has: another model of random weights."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=float(parameter.std()))


@contextlib.contextmanager
def stand_ins() -> Iterator[list[str]]:
    """Inside, Protenix' model can be imported without rdkit and optree; yields the names of those that were missing.

    Its featuriser asks rdkit for the elements' names, which the model does not use, and chunks are shaped with two
    functions that torch has as well.
    """
    import torch
    from torch.utils import _pytree as pytree

    def is_leaf(entry: Any) -> bool:
        return isinstance(entry, torch.Size)

    chem = ModuleType("rdkit.Chem")
    vars(chem).update(GetPeriodicTable=_NamelessElements)
    rdkit = ModuleType("rdkit")
    vars(rdkit).update(Chem=chem)
    optree = ModuleType("optree")
    vars(optree).update(
        tree_map=partial(pytree.tree_map, is_leaf=is_leaf), tree_flatten=partial(pytree.tree_flatten, is_leaf=is_leaf)
    )
    groups = {"rdkit": {"rdkit": rdkit, "rdkit.Chem": chem}, "optree": {"optree": optree}}
    missing = [name for name in groups if not _importable(name)]
    put = {name: module for group in missing for name, module in groups[group].items()}
    sys.modules.update(put)
    try:
        yield missing
    finally:
        for name in put:
            del sys.modules[name]


class _NamelessElements:
    """In the place of rdkit's periodic table."""

    def GetElementSymbol(self, number: int) -> str:
        return f"element {number}"


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
