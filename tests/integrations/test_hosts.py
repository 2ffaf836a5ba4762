"""SwinV2: two hosts with one replacement. Microsoft's module has a name that is not its own."""

import os
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

from flashbias.patches import PatchedOnTopError, PatchWarning, SignatureChangedError, UnsupportedVersionError

from .conftest import CHECKOUT, DEVICE

STAND_IN = (Path(__file__).parent / "checkout" / "models" / "swin_transformer_v2.py").read_text()
MODULE = "models.swin_transformer_v2"


@pytest.fixture
def write_models(tmp_path):
    """`write_models(source)` makes a folder with a `models.swin_transformer_v2` of that source."""

    def write(source):
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "__init__.py").touch()
        (tmp_path / "models" / "swin_transformer_v2.py").write_text(source)
        return str(tmp_path)

    return write


def is_patched(module):
    return module.WindowAttention.forward.__module__ == "flashbias.integrations.swin_v2"


def status(swin_v2):
    return {host.host: host for host in swin_v2.INTEGRATION.status()}


LATER = """
import sys
from flashbias.integrations import swin_v2
from flashbias.integrations._torchvision import make_importable
make_importable()
swin_v2.apply()
(status,) = (host for host in swin_v2.INTEGRATION.status() if host.host != "timm")
assert (status.installed, status.ok, status.patched) == ("checkout", True, False), status
assert not any(name.partition(".")[0] == "models" for name in sys.modules)
import models.swin_transformer_v2 as host
(status,) = (host for host in swin_v2.INTEGRATION.status() if host.host != "timm")
print(status.patched, host.WindowAttention.forward.__module__)
"""


def test_microsofts_code_is_patched_when_it_is_imported_and_not_before(host):
    environment = os.environ | {"PYTHONPATH": CHECKOUT}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LATER], env=environment, capture_output=True, text=True, check=False
    )
    assert process.stdout.splitlines()[-1:] == ["True flashbias.integrations.swin_v2"], process.stderr


@pytest.mark.parametrize(
    "source",
    ["", "class WindowAttention:\n    def forward(self, x, mask=None):\n        return self.qkv(x)\n"],
    ids=["no attention", "another attention"],
)
def test_another_projects_models_are_left_alone(swin_v2, import_models, write_models, source):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = import_models(write_models(source))
        assert swin_v2.apply() is False, "timm is patched already"
    assert "WindowAttention" not in vars(module) or not is_patched(module)
    found = status(swin_v2)["microsoft/Swin-Transformer"]
    assert (found.installed, found.ok, found.patched) == (None, False, False)
    assert "other code" in found.reason


def test_fork_that_reads_other_parts_is_left_alone(swin_v2, import_models, write_models):
    module = import_models(write_models(STAND_IN.replace("self.softmax(scores)", "self.softmax(scores * self.dim)")))
    assert not is_patched(module)


def test_failing_hook_leaves_the_host_importable(swin_v2, import_models, write_models):
    folder = write_models(
        STAND_IN.replace("def forward(self, x, mask=None)", "def forward(self, x, mask=None, rope=None)")
    )
    with pytest.warns(PatchWarning, match="rope"):
        module = import_models(folder)
    assert not is_patched(module)
    assert module.WindowAttention(8, (2, 2), 2)(torch.randn(3, 4, 8)).shape == (3, 4, 8)
    with pytest.raises(SignatureChangedError, match="rope"):
        swin_v2.apply()
    assert not is_patched(module)


def test_one_switch_for_both_hosts(swin_v2, host, microsoft):
    assert is_patched(host)
    assert is_patched(microsoft)
    assert all(found.patched and found.ok for found in status(swin_v2).values())
    assert swin_v2.revert() is True
    assert not is_patched(host)
    assert not is_patched(microsoft)
    assert not swin_v2.is_applied()
    assert swin_v2.revert() is False
    assert swin_v2.apply() is True
    assert swin_v2.apply() is False
    assert is_patched(host)
    assert is_patched(microsoft)


def test_host_that_cannot_be_reverted_does_not_keep_the_other(swin_v2, host, microsoft, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(host.WindowAttention, "forward", lambda self, x, mask=None: x)
        with pytest.raises(PatchedOnTopError, match="timm"):
            swin_v2.revert()
        assert not is_patched(microsoft)
        assert not swin_v2.is_applied()
    assert swin_v2.is_applied()


def test_host_that_cannot_be_patched_does_not_keep_the_other(swin_v2, host, microsoft, monkeypatch):
    swin_v2.revert()
    with monkeypatch.context() as context:
        context.setattr(metadata, "version", lambda name: "0.4.12")
        with pytest.raises(UnsupportedVersionError, match=r"timm 0\.4\.12"):
            swin_v2.apply()
        assert is_patched(microsoft)
        assert not is_patched(host)
        assert swin_v2.is_applied()
        swin_v2.revert()
        context.delitem(sys.modules, host.__name__)  # a model that nobody uses need not be patched
        assert swin_v2.apply() is True
        assert is_patched(microsoft)
        found = status(swin_v2)
        assert not found["timm"].ok
        assert found["microsoft/Swin-Transformer"].patched


def test_nothing_to_patch_is_an_error(swin_v2, monkeypatch):
    swin_v2.revert()
    monkeypatch.delitem(sys.modules, "timm.models.swin_transformer_v2")
    monkeypatch.setattr(metadata, "version", lambda name: "0.4.12")
    with pytest.raises(UnsupportedVersionError, match=r"timm 0\.4\.12"):
        swin_v2.apply()


def test_checkpoints_of_microsofts_code_keep_their_keys(host, microsoft):
    before = microsoft.WindowAttention(8, (2, 2), 2).to(DEVICE).eval()
    keys = list(before.state_dict())
    with torch.no_grad():
        before(torch.randn(3, 4, 8, device=DEVICE))
    assert list(before.state_dict()) == keys
    assert {"relative_coords_table", "relative_position_index"} <= set(keys)
