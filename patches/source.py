"""The source of a module, found and read without importing it, to tell one project's module from another's."""

import ast
import importlib.util
import sys
from pathlib import Path


def find_source(name: str) -> Path | None:
    """The file of the module `name`, imported or not; None where there is none.

    `importlib.util.find_spec` would import the packages around the module.
    """
    if name in sys.modules:
        file = getattr(sys.modules[name], "__file__", None)
        return None if file is None else Path(file)
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # a module without a spec
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.has_location and spec.origin else None
    files = (Path(folder, *rest).with_suffix(".py") for folder in spec.submodule_search_locations or ())
    return next((file for file in files if file.is_file()), None)


def attributes_read(source: str, method: str) -> set[str]:
    """Names of the attributes of `self` that `Class.method` of a module mentions; empty where there is no such method.

    Two classes of one name hardly ever consist of the same parts.
    """
    owner, _, name = method.partition(".")
    try:
        classes = [item for item in ast.parse(source).body if isinstance(item, ast.ClassDef) and item.name == owner]
    except (SyntaxError, ValueError):
        return set()
    return {
        node.attr
        for item in classes
        for function in item.body
        if isinstance(function, ast.FunctionDef) and function.name == name
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
