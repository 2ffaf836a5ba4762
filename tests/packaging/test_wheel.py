"""What people install: the source distribution, the wheel that is built from it, and the modules in the wheel."""

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import flashbias
from flashbias.tiles import triton_version

BUILD = "import sys, setuptools.build_meta as build; getattr(build, sys.argv[1])('made')"
IMPORT_ALL = """
import importlib, sys
from flashbias.integrations._torchvision import make_importable

make_importable()
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.argv[1]), (name, module.__file__)
"""


def run(*command: str, cwd: Path, **environment: str) -> None:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in which no earlier build has left anything."""
    copy = tmp_path_factory.mktemp("build") / "tree"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(root, copy, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    """The source distribution, unpacked."""
    run(sys.executable, "-c", BUILD, "build_sdist", cwd=tree)
    (archive,) = (tree / "made").iterdir()
    with tarfile.open(archive) as files:
        files.extractall(tree / "unpacked", filter="data")
    (unpacked,) = (tree / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Iterator[zipfile.ZipFile]:
    """The wheel, built from the source distribution alone."""
    run(sys.executable, "-c", BUILD, "build_wheel", cwd=sdist)
    (path,) = (sdist / "made").iterdir()
    with zipfile.ZipFile(path) as files:
        yield files


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_string(wheel.read(name).decode())


def test_packages_are_those_of_the_folders(
    root: Path, folders: dict[str, Path], setup: configparser.ConfigParser
) -> None:
    found = set()
    for name in ("flashbias_core", "patches", "integrations", "recipes"):
        parts = {path.parent.relative_to(root / name).parts for path in (root / name).rglob("*.py")}
        package = "flashbias" if name == "flashbias_core" else f"flashbias.{name}"
        found |= {".".join((package, *inner)) for inner in parts}
    assert set(setup["options"]["packages"].split()) == set(folders) == found
    for package, folder in folders.items():
        assert (folder / "__init__.py").is_file(), f"{package} has no __init__.py"


def test_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile, sources: dict[str, Path]) -> None:
    files = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {name.partition("/")[0] for name in files} == {"flashbias"}
    modules = {name.removesuffix(".py").replace("/", ".") for name in files if name.endswith(".py")}
    assert modules == set(sources)


def test_every_module_imports_from_the_wheel(wheel: zipfile.ZipFile, sources: dict[str, Path], tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    gluon = triton_version() >= (3, 6)  # before, nothing imports the kernels in it, and it lacks what they use
    names = [
        name.removesuffix(".__init__")
        for name, path in sources.items()
        if not name.endswith(".__main__") and (gluon or "triton.experimental" not in path.read_text("utf-8"))
    ]
    # -S leaves out .pth files, and with them an editable installation, which would answer for what the wheel lacks.
    path = os.pathsep.join((str(tmp_path), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    run(sys.executable, "-S", "-c", IMPORT_ALL, str(tmp_path), *names, cwd=tmp_path, PYTHONPATH=path)


def test_metadata(metadata: Message, setup: configparser.ConfigParser) -> None:
    assert metadata["Name"] == "flashbias"
    assert metadata["Version"] == flashbias.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata.get_payload(), "the README is the long description"
    assert set(metadata.get_all("Provides-Extra", [])) == set(setup["options.extras_require"])


def test_requirements_replace_nobodys_torch(metadata: Message) -> None:
    requirements = {(r := Requirement(line)).name: r for line in metadata.get_all("Requires-Dist", [])}
    for name in ("torch", "triton"):
        assert [specifier.operator for specifier in requirements[name].specifier] == [">="]
    marker = requirements["triton"].marker
    assert marker is not None
    assert marker.evaluate({"platform_system": "Linux"})
    assert not marker.evaluate({"platform_system": "Darwin"})
    assert "protenix" not in requirements, "it pins torch"


def test_licence_and_command_are_in_the_wheel(wheel: zipfile.ZipFile, root: Path) -> None:
    (licence,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    assert wheel.read(licence).decode() == (root / "LICENSE").read_text(encoding="utf-8")
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "flashbias = flashbias.recipes.cli:main" in wheel.read(entry_points).decode()
