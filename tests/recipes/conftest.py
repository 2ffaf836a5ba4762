"""The command line, started many times without loading torch as often."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Loads what takes long, once; then forks for every order, and the fork goes on as the command line.
DRIVER = """
import gc, json, os, sys
import torch
gc.freeze()  # or every fork would go through all of torch when it ends; before triton, which complains of it
import flashbias.integrations.swin_v2
from flashbias.recipes.cli import main
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.chdir(order["folder"])
os.environ.update(order["environment"])
for descriptor, path in enumerate(order["streams"]):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
sys.argv = ["flashbias", *order["arguments"]]
main()
"""


@dataclass(frozen=True)
class Ended:
    """What a process left."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def _driver() -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLASHBIAS_")}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    assert process.stdin is not None
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def flashbias(_driver: subprocess.Popen[str], tmp_path: Path) -> Callable[..., Ended]:
    """`flashbias(*arguments, **environment)` runs the command line in the test's folder."""

    def run(*arguments: str, **environment: str) -> Ended:
        assert _driver.stdin is not None
        assert _driver.stdout is not None
        streams = [tmp_path / f".{name}" for name in ("out", "err")]
        for path in streams:
            path.unlink(missing_ok=True)
        order = {
            "arguments": arguments,
            "environment": environment,
            "folder": str(tmp_path),
            "streams": [os.devnull, *map(str, streams)],
        }
        print(json.dumps(order), file=_driver.stdin, flush=True)
        code = int(_driver.stdout.readline())
        return Ended(code, *(path.read_text() for path in streams))

    return run


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., Ended]:
    """`python(*arguments)` runs Python itself in the test's folder."""

    def run(*arguments: str) -> Ended:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """`write(source, path)` makes a file in the test's folder, beside a module `beside`, and returns the path."""
    (tmp_path / "beside.py").write_text("text = 'from the folder of the script'")

    def write(source: str, path: str = "script.py") -> str:
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(source, encoding="latin-1")
        return path

    return write


# Enough of timm for the patch, and nothing that takes time to import.
HOST = """
class WindowAttention:
    def forward(self, x, mask=None):
        return "the host's own"

    def train(self, mode=True):
        return self
"""


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A stand-in for timm beside the test's scripts; returns the file of its SwinV2."""
    models = tmp_path / "timm" / "models"
    models.mkdir(parents=True)
    for package in (models.parent, models):
        (package / "__init__.py").touch()
    info = tmp_path / "timm-1.0.31.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 1.0.31\n")
    (models / "swin_transformer_v2.py").write_text(HOST)
    return models / "swin_transformer_v2.py"
