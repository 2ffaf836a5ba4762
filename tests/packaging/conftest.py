"""The repository as files: where things lie, and what setup.cfg says about them."""

import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="session")
def folders(setup: configparser.ConfigParser) -> dict[str, Path]:
    """Package names, and the folders that setup.cfg makes them from."""
    lines = setup["options"]["package_dir"].split("\n")
    pairs = (line.split("=") for line in lines if line.strip())
    return {name.strip(): ROOT / folder.strip() for name, folder in pairs}


@pytest.fixture(scope="session")
def sources(folders: dict[str, Path]) -> dict[str, Path]:
    """Every module of the package by its full name, `__init__` included as such."""
    return {f"{name}.{path.stem}": path for name, folder in folders.items() for path in sorted(folder.glob("*.py"))}
