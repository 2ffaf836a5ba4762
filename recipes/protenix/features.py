"""Input features of a real target: PDB 7wux, two proteins and three ligands, 1,218 tokens and 9,142 atoms.

`7wux_features.npz` was made by Protenix 2.0.0's own featuriser from the entry in its examples, without an MSA. It holds
arrays, the dtypes that the model wants, and shapes of arrays that are zero; nothing in it is pickled. Any other file of
that form serves as well, and Protenix' own input, JSON, where its data are installed.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from flashbias.errors import FlashBiasError


class FeaturesError(FlashBiasError, ValueError):
    """A file does not hold the features of a target."""


def load(path: Path | None = None, tokens: int | None = None) -> dict[str, Any]:
    """What `Protenix.forward` takes as `input_feature_dict`, which it changes: make it anew for each call, or copy it.

    path: of the features, by default those of 7wux; or `.json`, for Protenix' featuriser. tokens: only the first so
    many, or, beyond all, further copies of the target beside the first. Raises `FeaturesError` for another form.
    """
    import numpy
    import torch

    if path is not None and path.suffix == ".json":
        return _featurise(path, tokens)
    file = resources.files(__package__) / "7wux_features.npz" if path is None else path
    try:
        with file.open("rb") as stream, numpy.load(stream, allow_pickle=False) as stored:
            dtypes, zeros = (json.loads(str(stored[name])) for name in ("__dtypes__", "__zeros__"))
            arrays = {name: torch.from_numpy(stored[name]) for name in stored.files if not name.startswith("__")}
        flat = {name: array.to(getattr(torch, dtypes[name])) for name, array in arrays.items()}
        sizes = {"tokens": len(flat["token_index"]), "atoms": len(flat["atom_to_token_idx"])}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise FeaturesError(
            f"{path}, which cannot be read: {type(error).__name__}: {error}",
            "an .npz with arrays, __dtypes__ and __zeros__, as recipes/protenix/7wux_features.npz",
            "leave the option out for the features of 7wux",
        ) from error
    tokens = tokens or sizes["tokens"]
    if tokens != sizes["tokens"]:
        wanted = {"tokens": tokens, "atoms": _atoms(flat["atom_to_token_idx"], sizes, tokens)}
        flat = {name: _resize(name, array, sizes, wanted) for name, array in flat.items()}
        zeros = {name: [tokens if size == sizes["tokens"] else size for size in shape] for name, shape in zeros.items()}
    flat |= {name: torch.zeros(shape, dtype=getattr(torch, dtypes[name])) for name, shape in zeros.items()}
    features: dict[str, Any] = {name: array for name, array in flat.items() if "/" not in name}
    for name, array in flat.items():
        if "/" in name:
            group, _, name = name.partition("/")
            features.setdefault(group, {})[name] = array
    return features


def _featurise(path: Path, tokens: int | None) -> dict[str, Any]:
    """The first entry of a Protenix input, by Protenix."""
    import importlib

    from .host import configurations

    if tokens is not None:
        raise FeaturesError("--tokens beside a JSON input", "features as .npz, or all tokens", "leave one of them out")
    try:
        configs = configurations()
        configs.input_json_path = str(path)
        dataset = importlib.import_module("protenix.data.inference.infer_dataloader").InferenceDataset(configs=configs)
        data, _, problem = dataset[0]
    except Exception as error:  # whatever its data pipeline raises
        data, problem = None, f"{type(error).__name__}: {error}"
    if data is None or problem:
        raise FeaturesError(
            f"{path}, of which Protenix makes no features: {problem}",
            "an input as for `protenix pred`, and Protenix with its data",
            "see whether `protenix pred` takes it",
        )
    features: dict[str, Any] = data["input_feature_dict"]
    return features


# Of a copy of the target beside the first: what counts on from copy to copy.
COUNTED = ("token_index", "asym_id", "sym_id", "ref_space_uid", "atom_to_token_idx")


def _atoms(token_of_atom: Any, sizes: dict[str, int], tokens: int) -> int:
    """How many atoms so many tokens have."""
    copies, rest = divmod(tokens, sizes["tokens"])
    return copies * sizes["atoms"] + int((token_of_atom < rest).sum())


def _resize(name: str, array: Any, sizes: dict[str, int], wanted: dict[str, int]) -> Any:
    """The array for as many tokens and atoms; no pair of tokens from two copies has anything in common."""
    import torch

    along = [dim for dim, size in enumerate(array.shape) if size in sizes.values()]
    copies = -(-wanted["tokens"] // sizes["tokens"])
    if copies > 1 and along:
        step = sizes["tokens"] if name in ("token_index", "atom_to_token_idx") else int(array.max()) + 1
        parts = [array + i * step if name in COUNTED else array for i in range(copies)]
        if len(along) == 1:
            array = torch.cat(parts, along[0])
        else:
            whole = array.new_zeros([size * copies if dim in along else size for dim, size in enumerate(array.shape)])
            for i, part in enumerate(parts):
                whole[_block(array.shape, along, i)] = part
            array = whole
    kept = {sizes[kind] * copies: wanted[kind] for kind in sizes}
    return array[tuple(slice(kept.get(size)) for size in array.shape)].contiguous()


def _block(shape: Any, along: list[int], i: int) -> tuple[slice, ...]:
    """Where copy i stands in an array over pairs."""
    return tuple(slice(i * n, (i + 1) * n) if dim in along else slice(None) for dim, n in enumerate(shape))
