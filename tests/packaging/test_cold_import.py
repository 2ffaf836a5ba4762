"""`import flashbias` is cheap, and works where triton does not exist."""

import os
import subprocess
import sys

HEAVY = ("triton", "timm", "transformers", "torchvision", "matplotlib", "sklearn", "typer", "rich", "wrapt")

# Attention on the CPU, forward and backward.
ATTENTION = """
import torch
query, slopes = torch.randn(2, 5, 16, requires_grad=True), torch.tensor([0.5, 0.25])
flashbias.biased_attention(query, query, query, flashbias.ALiBi(slopes), is_causal=True).sum().backward()
assert query.grad.isfinite().all()
"""


def python(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_no_heavy_module() -> None:
    loaded = {name.partition(".")[0] for name in python("import sys, flashbias; print(*sys.modules)").split()}
    assert "flashbias" in loaded
    assert not loaded & set(HEAVY)


def test_works_without_triton() -> None:
    python(f"import sys; sys.modules['triton'] = None\nimport flashbias\n{ATTENTION}")


def test_import_says_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import torch, flashbias"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
