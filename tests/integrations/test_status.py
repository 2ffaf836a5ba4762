"""What can be told of integrations and hosts without importing a host."""

import importlib
import os
import subprocess
import sys
from importlib import metadata

import pytest

from flashbias import integrations
from flashbias.integrations.integration import HostStatus, Integration

NOTHING_IMPORTED = """
import importlib, sys
from flashbias import integrations
names = integrations.available()
assert not any(module in sys.modules for module in names.values())
for module in names.values():
    status = importlib.import_module(module).INTEGRATION.status()
    assert status and not any(host.patched for host in status)
assert not {"timm", "transformers", "torch._dynamo"} & sys.modules.keys(), "the compiler takes a second to load"
"""


@pytest.mark.parametrize("name", integrations.available())
def test_every_integration_has_the_same_face(name):
    module = importlib.import_module(integrations.available()[name])
    assert isinstance(module.INTEGRATION, Integration)
    assert module.INTEGRATION.name == name
    assert all(callable(getattr(module, face)) for face in ("apply", "revert", "is_applied", "configure"))


def test_telling_imports_no_host():
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", NOTHING_IMPORTED], env=environment, check=True)


def timm(swin_v2) -> HostStatus:
    return next(host for host in swin_v2.INTEGRATION.status() if host.host == "timm")


def test_status_of_a_patched_and_a_stock_host(swin_v2):
    found = timm(swin_v2)
    assert (found.installed, found.ok, found.reason, found.patched) == (metadata.version("timm"), True, "", True)
    assert found.module == "timm.models.swin_transformer_v2"
    swin_v2.revert()
    assert timm(swin_v2).ok
    assert not timm(swin_v2).patched


@pytest.mark.parametrize(
    ("version", "reason"), [("0.9.16", "found: timm 0.9.16; wanted: timm<2,>=1.0"), (None, "timm is not installed")]
)
def test_status_of_a_version_that_cannot_be_patched(swin_v2, monkeypatch, version, reason):
    def installed(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    swin_v2.revert()
    monkeypatch.setattr(metadata, "version", installed)
    found = timm(swin_v2)
    assert (found.installed, found.ok, found.patched) == (version, False, False)
    assert reason in found.reason


def test_status_tells_of_other_peoples_changes(swin_v2, host, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(host.WindowAttention, "forward", lambda self, x, mask=None: x)
        assert "WindowAttention.forward is now" in timm(swin_v2).reason
    swin_v2.revert()
    monkeypatch.setattr(host.WindowAttention, "forward", lambda self, x: x)
    assert "the parameters (self, x)" in timm(swin_v2).reason
