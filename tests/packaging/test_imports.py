"""Who may import whom: arrows point left only, along `flashbias <- patches <- integrations <- recipes`.

Imports inside a folder are relative, across folders they start with `flashbias`, and no folder is ever imported by its
own name, which would make a second copy of every class in it.
"""

import ast
import configparser
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

LAYERS = ("flashbias", "flashbias.patches", "flashbias.integrations", "flashbias.recipes")
FOLDERS = ("flashbias_core", "patches", "integrations", "recipes")
# Import names that are not those of the distribution, and what a distribution brings along.
PROVIDES = {"scikit-learn": {"sklearn"}, "scikit-fem": {"skfem"}, "pyyaml": {"yaml"}, "timm": {"timm", "torchvision"}}


def layer(module: str) -> int:
    """The position of the innermost layer that holds the module."""
    return max(i for i, name in enumerate(LAYERS) if f"{module}.".startswith(f"{name}."))


def imports(path: Path) -> Iterator[tuple[int, str, int]]:
    """(level, module, line) of every import, at the top or inside functions; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = f"{node.module}." if node.module else ""
            yield from ((node.level, start + alias.name, node.lineno) for alias in node.names)


def test_the_finder_sees_every_kind_of_import(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import a.b\nfrom .c import d\ndef f():\n    from flashbias import recipes as r\n")
    assert set(imports(path)) == {(0, "a.b", 1), (1, "c.d", 2), (0, "flashbias.recipes", 4)}
    assert [layer(name) for name in ("flashbias.patches_of", "flashbias.patches", "flashbias.recipes.cli")] == [0, 1, 3]


def test_arrows_point_left(sources: dict[str, Path]) -> None:
    wrong = [
        f"{path}:{line} imports {module}"
        for name, path in sources.items()
        for level, module, line in imports(path)
        if level == 0 and module.partition(".")[0] == "flashbias" and layer(module) > layer(name)
    ]
    assert not wrong


def test_imports_inside_a_folder_are_relative(sources: dict[str, Path]) -> None:
    wrong = []
    for name, path in sources.items():
        package = name.rpartition(".")[0]
        for level, module, line in imports(path):
            # The module itself, or the module that a name was imported from.
            inside = {module, module.rpartition(".")[0]} & (sources.keys() | {f"{package}.__init__"})
            if level == 0 and any(found.rpartition(".")[0] == package for found in inside):
                wrong.append(f"{path}:{line} imports {module}: wanted a relative import")
            if level > 1:
                wrong.append(f"{path}:{line} imports {'.' * level}{module}: wanted from flashbias... import ...")
    assert not wrong


def test_no_folder_is_imported_by_its_name(root: Path) -> None:
    wrong = [
        f"{path}:{line} imports {module}"
        for folder in (*FOLDERS, "tests")
        for path in sorted((root / folder).rglob("*.py"))
        for level, module, line in imports(path)
        if level == 0 and module.partition(".")[0] in FOLDERS
    ]
    assert not wrong


def test_patches_know_nothing_of_torch(sources: dict[str, Path]) -> None:
    found = {
        module.partition(".")[0]
        for name, path in sources.items()
        if name.startswith("flashbias.patches.")
        for level, module, _ in imports(path)
        if level == 0
    }
    assert found, "no imports at all: were the files read?"
    assert not found & {"torch", "numpy", "triton", "timm", "transformers"}


def provided(requirements: str) -> set[str]:
    names = [Requirement(line).name for line in requirements.split("\n") if line.strip()]
    return set().union(*(PROVIDES.get(name, {name}) for name in names))


@pytest.mark.parametrize("package", LAYERS)
def test_what_is_imported_is_declared(package: str, sources: dict[str, Path], setup: configparser.ConfigParser) -> None:
    declared = provided(setup["options"]["install_requires"]) | {"flashbias"}
    extras = setup["options.extras_require"]
    if layer(package) >= layer("flashbias.integrations"):
        declared |= provided(extras["timm"]) | provided(extras["transformers"])
    if package == "flashbias.recipes":
        declared |= provided(extras["recipes"])
    undeclared = [
        f"{path}:{line} imports {module}"
        for name, path in sources.items()
        if LAYERS[layer(name)] == package
        for level, module, line in imports(path)
        if level == 0 and module.partition(".")[0] not in declared | set(sys.stdlib_module_names)
    ]
    assert not undeclared


def test_nothing_is_required_in_vain(sources: dict[str, Path], setup: configparser.ConfigParser) -> None:
    imported = {module.partition(".")[0] for path in sources.values() for _, module, _ in imports(path)}
    assert provided(setup["options"]["install_requires"]) <= imported
