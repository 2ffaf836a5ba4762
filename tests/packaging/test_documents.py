"""The documents say what is true: their code runs, their commands exist, their tables are complete."""

import configparser
import csv
import os
import re
import subprocess
import sys
from abc import ABC
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import flashbias

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
FOLDERS = ("flashbias_core", "patches", "integrations", "recipes", "tests", ".ci")
# Links lead to the sources of what is said, and nowhere else.
HOSTS = {"arxiv.org", "doi.org", "github.com", "keepachangelog.com", "semver.org"}


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def console_lines(text: str) -> list[str]:
    return [line for block in fenced(text, "console") for line in block.splitlines() if line]


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def texts(root: Path) -> dict[Path, str]:
    """Every text file that the repository holds."""
    names = [*DOCUMENTS, "CITATION.cff", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml", "setup.cfg"]
    paths = [root / name for name in names]
    for folder in FOLDERS:
        paths += [p for p in sorted((root / folder).rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    readable = [path for path in paths if path.suffix not in (".png", ".npz", ".safetensors")]
    return {path: path.read_text(encoding="utf-8") for path in readable}


def test_code_of_the_readme_runs(readme: str, tmp_path: Path) -> None:
    blocks = fenced(readme, "python")
    assert blocks
    code = "from flashbias.integrations._torchvision import make_importable\nmake_importable()\n" + "\n".join(blocks)
    check = "\nassert out.shape == query.shape and lse.shape == query.shape[:-1]\nout.sum().backward()\n"
    run(sys.executable, "-c", code + check + "assert table.values.grad is not None\n", cwd=tmp_path)


def test_commands_of_the_readme_exist(readme: str, root: Path, setup: configparser.ConfigParser) -> None:
    (entry,) = (line for line in setup["options.entry_points"]["console_scripts"].split("\n") if line.strip())
    module, _, function = entry.partition("=")[2].strip().partition(":")
    named = sorted(set(re.findall(r"`flashbias ([a-z][a-z-]*)", readme)))
    assert named
    # One process for all: to start takes longer than to help.
    program = f"""
import sys
from {module} import {function}
for command in (None, *sys.argv[1:]):
    sys.argv = ["flashbias", *([command] if command else []), "--help"]
    try:
        assert not {function}(), command
    except SystemExit as end:
        assert not end.code, command
"""
    output = run(sys.executable, "-c", program, *named, cwd=root).stdout
    listed, *helps = output.split("Usage: flashbias")[1:]
    assert [text.split()[0] for text in helps] == named
    for command in named:
        assert re.search(rf"^\W*{command}\b", listed, flags=re.MULTILINE), f"flashbias --help does not list {command}"


MAIN = """
import os, sys
from timm.models.swin_transformer_v2 import WindowAttention
assert sys.argv[1:] == ["--eval"] and WindowAttention.forward.__module__ == "flashbias.integrations.swin_v2"
open(f"was here {os.environ.get('RANK')}", "w").close()
"""
MODULES = {"flashbias": "flashbias.recipes", "torchrun": "torch.distributed.run"}


def test_commands_of_the_readme_run(readme: str, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(
        f"from flashbias.integrations import _torchvision as t; t.make_importable(){MAIN}"
    )
    lines = [line for line in console_lines(readme) if not line.startswith("make ")]
    for line in lines:
        program, *arguments = line.split()
        run(sys.executable, "-m", MODULES[program], *arguments, cwd=tmp_path)
    ranks = {path.name for path in tmp_path.glob("was here *")}
    assert ranks == {"was here None", "was here 0", "was here 1"}, lines


def test_make_targets_of_the_documents_exist(root: Path) -> None:
    named = set()
    for name in DOCUMENTS:
        text = (root / name).read_text(encoding="utf-8")
        named |= set(re.findall(r"`make ([a-z-]+)`", text))
        named |= {line.split()[1] for line in console_lines(text) if line.startswith("make ")}
    assert {"demo", "test"} <= named
    for target in sorted(named):
        run("make", "--dry-run", target, cwd=root)


def test_tables_of_the_readme_are_complete(readme: str, root: Path, texts: dict[Path, str]) -> None:
    exported = [getattr(flashbias, name) for name in flashbias.__all__]
    classes = [kind for kind in exported if isinstance(kind, type)]
    kinds = [
        kind for kind in classes if issubclass(kind, (flashbias.Bias, flashbias.Mask)) and kind.__bases__ != (ABC,)
    ]
    assert len(kinds) >= 7
    for kind in kinds:
        assert f"\n| `{kind.__name__}(" in readme
    code = "".join(text for path, text in texts.items() if path.suffix == ".py" and "tests" not in path.parts)
    in_code = set(re.findall(r"\bFLASHBIAS_[A-Z]+\b", code))
    assert in_code == set(re.findall(r"\n\| `(FLASHBIAS_[A-Z]+)`", readme))
    hosts = {
        module.removesuffix(".__init__").split(".")[0]
        for path in (root / "integrations").rglob("*.py")
        if "\nINTEGRATION = " in path.read_text("utf-8")
        for module in [".".join(path.relative_to(root / "integrations").with_suffix("").parts)]
    }
    assert hosts == set(re.findall(r"\n\|[^|]+\| `flashbias\.integrations\.(\w+)` \|", readme))


def test_numbers_of_the_readme_are_stored(readme: str, root: Path) -> None:
    with (root / "recipes/results/nvidia-h200/bench_fwd.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    stored = {row["workload"]: row for row in rows if row["peer"] == "flashbias"}
    without = {row["workload"]: row for row in rows if row["peer"] == "cudnn-none"}
    shown = re.findall(r"\n\| `([\w-]+)` \| \([^)]+\) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", readme)
    assert {name for name, *_ in shown} == set(stored)
    for name, ours, theirs, tax in shown:
        assert float(ours) == pytest.approx(float(stored[name]["milliseconds"]), rel=0.005)
        assert float(theirs) == pytest.approx(float(without[name]["milliseconds"]), rel=0.005)
        assert float(tax) == pytest.approx(float(stored[name]["tax"]), abs=0.005)
        assert stored[name]["accurate"] == "True"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str, root: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", (root / name).read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (root / target).exists(), target


def test_citation(root: Path) -> None:
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    assert citation["version"] == flashbias.__version__
    assert citation["authors"] == [{"name": "the flashbias authors"}]
    (paper,) = citation["references"]
    assert paper["title"] == "FlashBias: Fast Computation of Attention with Bias"
    assert [author["family-names"] for author in paper["authors"]] == (
        ["Wu", "Guo", "Ma", "Sun", "Wang", "Matusik", "Long"]
    )


def test_version_has_one_source(texts: dict[Path, str], setup: configparser.ConfigParser) -> None:
    assert setup["metadata"]["version"] == "attr: flashbias._version.__version__"
    holders = {path.name for path, text in texts.items() if re.search(r"^__version__ = ", text, flags=re.MULTILINE)}
    assert holders == {"_version.py"}


def test_changelog(root: Path) -> None:
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[([^\]]+)\]", text, flags=re.MULTILINE)
    assert sections[0] == "Unreleased" or sections[0] == flashbias.__version__
    kinds = set(re.findall(r"^### (.+)$", text, flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_constraints_pin_what_is_required(root: Path, setup: configparser.ConfigParser) -> None:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {(r := Requirement(line)).name: r for line in lines if line and not line.startswith("#")}
    assert pins["torch"].specifier == SpecifierSet("==2.13.0")
    extras = setup["options.extras_require"]
    required = [setup["options"]["install_requires"], extras["timm"], extras["recipes"], extras["test"], extras["dev"]]
    for requirement in (Requirement(line) for text in required for line in text.split("\n") if line):
        if requirement.name != "flashbias":
            (pin,) = pins[requirement.name].specifier
            assert pin.operator == "=="
            assert requirement.specifier.contains(pin.version), f"{requirement} excludes its own pin {pin}"


def test_texts_fit_any_machine(texts: dict[Path, str]) -> None:
    wrong = []
    for path, text in texts.items():
        for i, line in enumerate(text.splitlines(), 1):
            unmended = re.search(r"\b(TODO|FIXME|XXX)\b|^(<{7}|>{7}) ", line)
            elsewhere = [host for host in re.findall(r"https?://([^/\s)\"'>]+)", line) if host not in HOSTS]
            of_a_machine = re.search(r"(?<![\w.)}\]])/(home|root|work|Users|opt|mnt)/\w", line)
            if path != Path(__file__) and (unmended or elsewhere or of_a_machine):
                wrong.append(f"{path}:{i}: {line.strip()}")
    assert not wrong
