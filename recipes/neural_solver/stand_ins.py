"""Empty packages in the place of requirements of `run.py` that a run does not use.

    flashbias neural-solver stand-ins FOLDER
    PYTHONPATH=FOLDER flashbias run --patch neural_solver -- run.py --loader elas --model Transformer_Spatial_Bias ...

`run.py` imports the packages of all its models and loaders, whatever is asked for. Where one of them cannot be
installed, a package of its name that says so when something of it is used lets the rest run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

# What the library imports at its start, and the model and the elasticity data do without.
MODULES = (
    "h5py", "kappamodules", "kappamodules.layers", "kappamodules.transformer", "torch_geometric",
    "torch_geometric.data", "torch_geometric.nn", "torch_geometric.utils", "vtk", "vtk.util", "vtk.util.numpy_support",
)  # fmt: skip

SOURCE = '''"""A stand-in: {package} is not installed here, and nothing works that uses it."""


class _Missing:
    def __init__(self, *args, **kwargs):
        raise ImportError("{package} is not installed, a stand-in has its place: install it")


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Missing
'''


def write(folder: Path) -> list[str]:
    """Write a package for each that is not installed; returns their names."""
    missing = [name for name in MODULES if "." not in name and importlib.util.find_spec(name) is None]
    for module in MODULES:
        package = module.partition(".")[0]
        if package in missing:
            place = folder.joinpath(*module.split("."))
            place.mkdir(parents=True, exist_ok=True)
            (place / "__init__.py").write_text(SOURCE.format(package=package), encoding="utf-8")
    return missing
