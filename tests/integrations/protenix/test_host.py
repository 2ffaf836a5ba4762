"""Protenix: how the patch gets into it and out again, and what it refuses."""

import copy
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from flashbias.patches import PatchedOnTopError, SignatureChangedError, UnsupportedVersionError

from .conftest import DEVICE, PACKAGE, give_structure, write_version


def targets(host):
    return {
        "TriangleAttention": vars(host.triangular.TriangleAttention)["forward"],
        "TriangleMultiplicativeUpdate": vars(host.triangular.TriangleMultiplicativeUpdate)["forward"],
        "AttentionPairBias": vars(host.transformer.AttentionPairBias)["standard_multihead_attention"],
        "local": vars(host.transformer.AttentionPairBias)["local_multihead_attention"],
        "Protenix": vars(host.model.Protenix)["sample_diffusion"],
    }


def test_revert_restores_the_identical_objects(protenix, host):
    protenix.revert()
    before = targets(host)
    attributes = {name: set(vars(getattr(host.triangular, name))) for name in ("TriangleAttention",)}
    assert protenix.apply()
    assert all(function.__module__.startswith("flashbias.") for function in targets(host).values())
    assert protenix.is_applied()
    assert not protenix.apply()
    assert protenix.revert()
    after = targets(host)
    assert all(after[name] is before[name] for name in before)
    assert set(vars(host.triangular.TriangleAttention)) == attributes["TriangleAttention"]
    assert not protenix.is_applied()


def test_status_names_host_and_version(protenix):
    (status,) = protenix.INTEGRATION.status()
    assert (status.host, status.installed) == ("protenix", metadata.version("protenix"))
    assert (status.ok, status.patched, status.reason) == (True, True, "")


@pytest.mark.parametrize("version", ["0.5.0", "0.7.3", "3.0.0"])
def test_unsupported_version_is_refused_by_name(protenix, host, monkeypatch, tmp_path, version):
    protenix.revert()
    before = targets(host)
    monkeypatch.syspath_prepend(write_version(tmp_path, version))
    with pytest.raises(UnsupportedVersionError, match=rf"protenix {version}.*pip install 'protenix") as error:
        protenix.apply()
    assert "<3,>=1.0.0" in str(error.value)
    assert targets(host) == before


@pytest.mark.parametrize("version", ["1.0.0", "1.0.9", "1.1.0", "2.0.0", "2.3.1"])
def test_supported_versions(protenix, monkeypatch, tmp_path, version):
    protenix.revert()
    monkeypatch.syspath_prepend(write_version(tmp_path, version))
    assert protenix.apply()


def test_changed_signature_is_refused_and_nothing_patched(protenix, host, monkeypatch):
    protenix.revert()
    attention = host.transformer.AttentionPairBias
    monkeypatch.setattr(attention, "standard_multihead_attention", lambda self, q, kv, z, temperature: q)
    before = targets(host)
    with pytest.raises(SignatureChangedError, match="temperature"):
        protenix.apply()
    assert targets(host) == before


def test_somebody_elses_patch_on_top_is_respected(protenix, host, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(host.triangular.TriangleAttention, "forward", lambda self, x: x)
        with pytest.raises(PatchedOnTopError, match="TriangleAttention"):
            protenix.revert()


def test_disabled(protenix, host, monkeypatch):
    protenix.revert()
    monkeypatch.setenv("FLASHBIAS_DISABLE", "1")
    assert not protenix.apply()
    assert not protenix.is_applied()


def test_triangle_multiplication_without_cuequivariance(host, stock, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cuequivariance_torch", None)
    module = give_structure(host.triangular.TriangleMultiplicationOutgoing(c_z=16, c_hidden=16))
    z = torch.randn(9, 9, 16, device=DEVICE)
    with torch.no_grad():
        expected = module(z)
        assert not caplog.text
        ours = copy.deepcopy(module)(z, triangle_multiplicative="cuequivariance")
        assert "cuEquivariance is not installed" in caplog.text
        with stock(), pytest.raises(ImportError):
            module(z, triangle_multiplicative="cuequivariance")
    torch.testing.assert_close(ours, expected)


IMPORTS = {
    "before": "import flashbias.integrations.protenix as ours\nimport protenix.model.protenix as host\n",
    "after": "import protenix.model.protenix as host\nimport flashbias.integrations.protenix as ours\n",
}


def python(code, *paths):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "LAYERNORM_TYPE": "torch"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("order", IMPORTS)
def test_one_import_patches_whichever_comes_first(paths, order):
    host = "from protenix.model.triangular import triangular\n"
    process = python(
        f"{IMPORTS[order]}{host}print(ours.is_applied(), triangular.TriangleAttention.forward.__module__)", *paths
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-2:] == ["True", "flashbias.integrations.protenix.triangle"]


def test_a_host_that_cannot_be_patched_is_importable_all_the_same(tmp_path):
    code = IMPORTS["before"] + "print(ours.is_applied(), host.Protenix.sample_diffusion.__module__)"
    process = python(code, write_version(tmp_path, "9.0"), PACKAGE)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-2:] == ["False", "protenix.model.protenix"]
    assert "PatchWarning" in process.stderr
    assert "protenix 9.0" in process.stderr
