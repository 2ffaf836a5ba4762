"""`flashbias protenix pred`: the arguments of `protenix pred`, with the patch on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "integrations" / "protenix" / "package"


@pytest.fixture
def flashbias(tmp_path):
    """`flashbias(*arguments)` in a process that sees the stand-in, with a version."""

    def run(*arguments, version="2.0.0", package=PACKAGE):
        info = tmp_path / f"versions/{version}/protenix-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: protenix\nVersion: {version}\n")
        paths = [str(info.parent), *([str(package)] if package else [])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "LAYERNORM_TYPE": "torch"}
        command = [sys.executable, "-m", "flashbias.recipes", "protenix", *arguments]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )

    return run


def test_arguments_are_protenix_own_and_the_patch_is_on(flashbias, tmp_path):
    process = flashbias("pred", "-i", "input.json", "--out_dir", "made", "--seeds", "1,2", "--use_msa", "false")
    assert process.returncode == 0, process.stderr
    assert (process.stdout, process.stderr) == ("predicted\n", "")
    run = json.loads((tmp_path / "made/run.json").read_text())
    assert (run["input"], run["seeds"], run["use_msa"]) == ("input.json", "1,2", False)
    assert run["triatt_kernel"] == "cuequivariance"
    assert run["attention"] == "flashbias.integrations.protenix.triangle"


def test_help_is_protenix_own(flashbias):
    process = flashbias("pred", "--help")
    assert process.returncode == 0
    assert "--triatt_kernel" in process.stdout


def test_wrong_arguments_are_refused_by_protenix(flashbias):
    process = flashbias("pred", "--no-such-option")
    assert process.returncode == 2
    assert "--no-such-option" in process.stderr


def test_errors_are_protenix_own(flashbias):
    process = flashbias("pred", "-i", "nothing")
    assert process.returncode == 1
    assert "RuntimeError: input file nothing does not exist" in process.stderr


def test_an_unsupported_version_is_refused_before_anything_runs(flashbias, tmp_path):
    process = flashbias("pred", "-i", "input.json", version="0.5.0")
    assert process.returncode == 2
    assert "protenix 0.5.0" in process.stderr
    assert "pip install" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "output").exists()


def test_without_protenix_there_is_a_named_error(flashbias):
    process = flashbias("pred", "-i", "input.json", package=None)
    assert process.returncode == 2
    assert process.stderr.startswith("flashbias: ")
    assert "Traceback" not in process.stderr
