"""`flashbias doctor`: it says what is here, quickly, and is broken by nothing that is broken."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from flashbias import __version__
from flashbias.recipes import doctor, machine


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_report_as_json(backend, flashbias):
    ended = flashbias("doctor", "--json", FLASHBIAS_BACKEND=backend)
    assert (ended.code, ended.err) == (0, "")
    report = json.loads(ended.out)
    assert report["torch"] == torch.__version__
    assert report["kernels"]["usable"] is (backend == "auto" and torch.cuda.is_available())
    assert report["environment"]["FLASHBIAS_BACKEND"] == backend
    (host, *_) = report["hosts"]
    assert (host["integration"], host["host"], host["patched"]) == ("swin_v2", "timm", False)


def test_report_as_tables(flashbias):
    ended = flashbias("doctor", COLUMNS="200")
    assert (ended.code, ended.err) == (0, "")
    for expected in (torch.__version__, sys.version.split()[0], "swin_v2", "timm"):
        assert expected in ended.out


HOSTS = """
import json, sys
from flashbias.recipes import doctor
(found, *_) = doctor.examine()["hosts"]
print(json.dumps(found | {"imported": "timm" in sys.modules}))
"""


@pytest.mark.parametrize(("version", "reason"), [("1.0.31", ""), ("3.0", "timm 3.0")])
def test_host_is_judged_without_being_imported(version, reason, host, write, flashbias):
    metadata = host.parents[2] / "timm-1.0.31.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0.31", version))
    found = json.loads(flashbias("run", "--patch", "swin_v2", write(HOSTS)).out)
    assert (found["installed"], found["ok"], found["imported"]) == (version, not reason, False)
    assert reason in found["reason"]


def test_broken_integration_breaks_only_its_row(monkeypatch, capsys):
    monkeypatch.setattr(importlib, "import_module", lambda name: 1 / 0)
    doctor.run(as_json=False)
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().out


def test_kernel_that_fails_is_the_report(monkeypatch):
    def fail():
        raise RuntimeError("Failed to find C compiler")

    card = {"name": "GPU", "capability": "9.0", "memory_gib": 80.0}
    monkeypatch.setattr(machine, "gpus", lambda: [card])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "_try_kernel", fail)
    report = doctor.examine()
    assert report["gpus"] == [card]
    assert report["kernels"] == {"usable": False, "reason": "RuntimeError: Failed to find C compiler"}


def test_torch_that_finds_no_driver_is_quoted(monkeypatch):
    def none():
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return []

    monkeypatch.setattr(machine, "gpus", none)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver on your system is too old" in doctor.examine()["kernels"]["reason"]


def test_no_triton_is_said(monkeypatch, capsys):
    monkeypatch.setattr(machine, "version", lambda distribution: "")
    doctor.run(as_json=False)
    assert "not installed" in capsys.readouterr().out


@pytest.mark.gpu
def test_kernels_run_on_a_gpu():
    report = doctor.examine()
    assert report["kernels"] == {"usable": True, "reason": ""}
    assert report["driver"]


def test_conditions_of_a_result():
    found = machine.conditions("cpu")
    assert list(found) == ["device", "driver", "torch", "triton", "flashbias", "commit"]
    assert found["flashbias"] == __version__


def test_commit_is_that_of_the_checkout_or_named(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "recipes" / "machine.py"))
    monkeypatch.setenv("FLASHBIAS_COMMIT", "abc1234")
    assert machine.commit() == "abc1234"
    (tmp_path / ".git").mkdir()  # no repository after all
    assert machine.commit() == "abc1234"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build", "580.95.05"),
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54  Tue Jun  6\nGCC version:  gcc version 12.3.0",
            "535.54",
        ),
        ("nothing", None),
    ],
)
def test_driver(monkeypatch, text, version):
    monkeypatch.setattr(machine, "Path", lambda path: SimpleNamespace(exists=lambda: True, read_text=lambda: text))
    assert machine.driver() == version
