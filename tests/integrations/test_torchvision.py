"""The helper for a torchvision that was built for another torch, on stand-ins for it."""

import os
import subprocess
import sys

import pytest

TRY = "from flashbias.integrations._torchvision import make_importable; print(make_importable()); "
BROKEN = """
import torch
for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}")(lambda *args: args[0])
"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (BROKEN, "True"),
        ("", "False"),
        ("raise RuntimeError('something else')", "RuntimeError: something else"),
    ],
    ids=["built for another torch", "whole", "broken otherwise"],
)
def test_only_the_two_operators_are_declared_and_only_if_missing(tmp_path, source, expected):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(source)
    process = subprocess.run(
        [sys.executable, "-c", TRY + "import torch, torchvision; print(hasattr(torch.ops.torchvision, 'nms'))"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode == 0:
        assert process.stdout.split() == [expected, expected]
    else:
        assert expected in process.stderr


def test_absent_torchvision_is_no_matter():
    code = "import importlib.util; importlib.util.find_spec = lambda name: None; " + TRY
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "False"
