"""Whole runs of Protenix by every kernel: on a stand-in, or on the real package of `FLASHBIAS_PROTENIX_PATH`."""

import csv
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flashbias.recipes.cli import app
from flashbias.recipes.protenix import features, host, profile, report, sweep, whole

PACKAGE = os.environ.get("FLASHBIAS_PROTENIX_PATH") or str(Path(__file__).parents[1] / "integrations/protenix/package")
SMALL = ("--tokens", "12", "--blocks", "1", "--cycles", "1", "--steps", "2", "--samples", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def package(monkeypatch, tmp_path):
    """Protenix on the path, with a version; not patched, and not about to be by an import of the integration."""
    (tmp_path / "version/protenix-2.0.0.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: protenix\nVersion: 2.0.0\n"
    (tmp_path / "version/protenix-2.0.0.dist-info/METADATA").write_text(metadata)
    monkeypatch.setattr(sys, "path", [*sys.path, PACKAGE, str(tmp_path / "version")])
    monkeypatch.setenv("LAYERNORM_TYPE", "torch")
    from flashbias.integrations import protenix

    protenix.revert()
    yield
    protenix.revert()


@pytest.fixture
def built():
    return host.build("cpu", blocks=1)


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def test_zero_matrices_are_drawn_anew_and_said(built):
    assert "zero matrices drawn anew with std 0.02" in built.weights
    assert not built.weights.startswith("random, 0 ")
    assert all(p.any() for p in built.model.parameters() if p.dim() > 1)


def test_each_variant_computes_as_it_says(built):
    from flashbias.integrations import protenix

    target, size = features.load(tokens=12), whole.Size(1, 2, 2)
    runs = {
        kernel: whole.run(built, target, whole.Variant(kernel, "fp32"), size, "cpu")
        for kernel in ("torch", whole.OURS, whole.NO_BIAS)
    }
    again = whole.run(built, target, whole.Variant("torch", "fp32"), size, "cpu")
    assert not protenix.is_applied()
    atoms = len(target["atom_to_token_idx"])
    assert runs["torch"].coordinates.shape == (2, atoms, 3)
    assert runs["torch"].plddt.shape == (2, atoms)
    assert runs["torch"].distogram.shape[:2] == (12, 12)
    for outcome in runs.values():
        stages = outcome.seconds
        assert all(stages[name] > 0 for name in whole.STAGES)
        assert stages["total"] >= stages["trunk"] + stages["diffusion"] + stages["confidence"]
    assert whole.differences(again, runs["torch"])["rmsd_max"] == 0
    scale = float(runs["torch"].coordinates.abs().max())
    assert 0 < whole.differences(runs[whole.OURS], runs["torch"])["rmsd_max"] < 1e-5 * scale
    wrong = whole.differences(runs[whole.NO_BIAS], runs["torch"])
    assert wrong["rmsd_max"] > 1e-5 * scale


def test_differences_are_those_of_the_definition():
    def outcome(shift):
        plddt = torch.full((2, 4), 50 + shift)
        bins = torch.tensor([0.5 + shift / 100, 0.5 - shift / 100]).expand(3, 3, 2)
        return whole.Outcome({}, 0, torch.full((2, 4, 3), shift), plddt, plddt[:, 0] / 100, bins)

    found = whole.differences(outcome(1.0), outcome(0.0))
    expected = {"rmsd_mean": 3**0.5, "rmsd_max": 3**0.5, "plddt": 1, "ptm": 0.01, "distogram": 0.01}
    assert found == pytest.approx(expected, rel=1e-5)


def test_table_has_a_row_for_every_kernel(tmp_path):
    done = CliRunner().invoke(app, ["protenix", "table", *SMALL, "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = read(tmp_path / "protenix_table.csv")
    assert list(rows) == ["torch", "triattention", "cuequivariance", whole.NO_BIAS, whole.OURS]
    for name in ("triattention", "cuequivariance"):
        assert (rows[name]["status"], rows[name]["reason"]) == ("absent", "needs a GPU")
    for name in ("torch", whole.NO_BIAS, whole.OURS):
        assert (rows[name]["status"], rows[name]["tokens"], rows[name]["blocks"]) == ("ok", "12", "1")
        assert float(rows[name]["total_s"]) > 0
        assert "random" in rows[name]["weights"]
    assert (tmp_path / "protenix_table.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("tf32", "installed", "device", "expected"),
    [
        (True, True, "cuda", True),
        (True, False, "cuda", False),
        (False, True, "cuda", False),
        (True, True, "cpu", False),
    ],
)
def test_the_default_multiplication_stays_where_it_can_run(built, monkeypatch, tf32, installed, device, expected):
    monkeypatch.setattr(whole.importlib.util, "find_spec", lambda name: installed or None)
    with whole.computed_by(whole.Variant(whole.OURS, tf32=tf32), built, device):
        assert built.configs.triangle_multiplicative == ("cuequivariance" if expected else "torch")
    assert built.configs.triangle_multiplicative == "torch"


def test_rows_can_be_chosen(tmp_path):
    arguments = ["protenix", "table", *SMALL, "--kernels", f"{whole.NO_BIAS},torch", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = read(tmp_path / "protenix_table.csv")
    assert list(rows) == [whole.NO_BIAS, "torch"]
    assert {row["against"] for row in rows.values()} == {whole.NO_BIAS}
    assert float(rows["torch"]["rmsd_mean"]) > 0


def test_without_the_row_to_compare_with_the_others_are_shown(tmp_path):
    arguments = ["protenix", "table", *SMALL, "--kernels", f"triattention,{whole.OURS}", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = read(tmp_path / "protenix_table.csv")
    assert [row["status"] for row in rows.values()] == ["absent", "ok"]
    assert rows[whole.OURS]["rmsd_mean"] == ""
    assert (tmp_path / "protenix_table.png").stat().st_size > 1000


def test_a_failing_row_says_why_and_the_others_go_on(tmp_path, monkeypatch):
    def failing(host, features, variant, *others, run=whole.run):
        if variant.kernel == whole.NO_BIAS:
            raise RuntimeError("out of luck")
        return run(host, features, variant, *others)

    monkeypatch.setattr(report, "run", failing)
    report.table(report.Request(whole.Size(1, 2, 2), tokens=12, blocks=1, device="cpu", out=tmp_path))
    rows = read(tmp_path / "protenix_table.csv")
    assert (rows[whole.NO_BIAS]["status"], rows[whole.NO_BIAS]["reason"]) == ("failed", "RuntimeError: out of luck")
    assert rows[whole.OURS]["status"] == "ok"


def test_compare_reports_what_is_promised(tmp_path):
    done = CliRunner().invoke(app, ["protenix", "compare", *SMALL, "--out", str(tmp_path)], catch_exceptions=False)
    rows = read(tmp_path / "protenix_compare.csv")
    rmsd = {name: float(row["rmsd_mean"]) for name, row in rows.items()}
    assert rmsd["torch, fp32"] == 0
    assert rmsd["flashbias, fp32"] < rmsd["flashbias, bf16"]
    fp32 = rmsd["flashbias, fp32"] <= 2 * rmsd["torch, fp32, other chunks"]
    bf16 = rmsd["flashbias, bf16"] <= rmsd["torch, bf16"]
    assert f"flashbias, fp32 within 2 x torch, fp32, other chunks: {'yes' if fp32 else 'NO'}" in done.output
    assert f"flashbias, bf16 within 1 x torch, bf16: {'yes' if bf16 else 'NO'}" in done.output
    assert done.exit_code == (0 if fp32 and bf16 else 1)


def test_without_the_reference_nothing_is_promised(tmp_path, monkeypatch):
    def failing(host, features, variant, *others, run=whole.run):
        if variant == whole.Variant("torch", "fp32", tf32=False):
            raise RuntimeError("out of memory")
        return run(host, features, variant, *others)

    monkeypatch.setattr(report, "run", failing)
    request = report.Request(whole.Size(1, 2, 2), tokens=12, blocks=1, device="cpu", out=tmp_path)
    rows, kept = report.compare(request)
    assert [row["status"] for row in rows] == ["failed", "ok", "ok", "ok", "ok"]
    assert set(kept.values()) == {None}


@pytest.mark.parametrize(
    ("ours", "theirs", "holds"),
    [
        ([0.8], [0.79], False),
        ([0.79], [0.79], True),
        ([0.80, 0.78, 0.81, 0.79], [0.79, 0.80, 0.78, 0.80], True),
        ([0.80, 0.79, 0.81, 0.80], [0.77, 0.76, 0.79, 0.77], False),
        ([0.70, 0.69, 0.71, 0.70], [0.77, 0.76, 0.79, 0.77], True),
    ],
)
def test_distances_are_larger_where_chance_does_not_explain_it(ours, theirs, holds):
    assert report.no_further(ours, theirs) == holds


def test_each_seed_has_weights_and_noise_of_its_own(tmp_path, monkeypatch):
    weights, sizes = [], []

    def noted(host, *others, run=whole.run):
        weights.append([p.detach().clone() for p in host.model.parameters() if p.dim() > 1])
        sizes.append(others[2])
        return run(host, *others)

    monkeypatch.setattr(report, "run", noted)
    request = report.Request(whole.Size(1, 2, 2), tokens=12, blocks=1, device="cpu", seeds=2, out=tmp_path)
    variants = {"torch": whole.Variant("torch", "fp32"), whole.OURS: whole.Variant(whole.OURS, "fp32")}
    rows = report.measure(request, variants, "torch", tmp_path / "rows.csv")
    assert [size.seed for size in sizes] == [row["seed"] for row in rows] == [101, 101, 102, 102]
    assert [row["rmsd_mean"] == 0 for row in rows] == [True, False, True, False]
    for first, same, other in zip(weights[0], weights[1], weights[2], strict=True):
        assert torch.equal(first, same)
        if first.any():
            assert not torch.equal(first, other)
            assert first.numel() < 1000 or 0.8 < float(other.std() / first.std()) < 1.25


def test_sweep_measures_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "REPEATS", 1)
    arguments = ["protenix", "sweep", *SMALL[2:], "--tokens", "8,12", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    with (tmp_path / "protenix_sweep.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {(row["tokens"], row["part"], row["kernel"]) for row in rows if row["status"] == "ok"}
    for tokens in ("8", "12"):
        for part in ("attention", "module", "block", "run"):
            assert {(tokens, part, "torch"), (tokens, part, whole.OURS)} <= found
    assert (tmp_path / "protenix_sweep.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "wrong",
    [
        ("table", "--dtype", "fp64"),
        ("table", "--kernels", "all,torch"),
        ("sweep", "--parts", "blocks"),
        ("sweep", "--kernels", "flashbias"),
    ],
)
def test_wrong_choices_are_refused(wrong):
    done = CliRunner().invoke(app, ["protenix", *wrong])
    assert done.exit_code == 2
    assert "wanted" in done.output


def test_a_checkpoint_takes_the_place_of_random_weights(built, tmp_path):
    weights = {f"module.{name}": tensor for name, tensor in built.model.state_dict().items()}
    torch.save({"model": weights}, tmp_path / "weights.pt")
    loaded = host.build("cpu", tmp_path / "weights.pt", blocks=1, seed=1)
    assert loaded.weights == "weights.pt"
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, weights[f"module.{name}"])


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "weights.pt")
    with pytest.raises(host.ModelError, match=r"weights\.pt"):
        host.build("cpu", tmp_path / "weights.pt", blocks=1)


def test_without_protenix_there_is_a_named_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "protenix.config.config", None)
    with pytest.raises(host.ModelError, match="pip install protenix"):
        host.build("cpu")


@pytest.fixture
def json_input(tmp_path):
    def write(sequence):
        path = tmp_path / "input.json"
        path.write_text(
            json.dumps([{"name": "a", "sequences": [{"proteinChain": {"sequence": sequence, "count": 1}}]}])
        )
        return path

    return write


@pytest.mark.skipif("FLASHBIAS_PROTENIX_PATH" in os.environ, reason="Protenix' featuriser needs its data")
def test_protenix_own_input_is_taken(tmp_path, json_input):
    arguments = ["--input", str(json_input("MKTAYIAK")), *SMALL[2:], "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["protenix", "table", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = read(tmp_path / "protenix_table.csv")
    assert (rows[whole.OURS]["tokens"], rows[whole.OURS]["atoms"]) == ("8", "16")


@pytest.mark.parametrize(("sequence", "tokens", "found"), [("M?", None, "no features"), ("MK", 1, "--tokens")])
def test_an_input_that_gives_no_features_is_refused(json_input, sequence, tokens, found):
    with pytest.raises(features.FeaturesError, match=found):
        features.load(json_input(sequence), tokens)


def test_a_patch_that_is_off_is_not_measured_as_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHBIAS_DISABLE", "1")
    rows = report.table(report.Request(whole.Size(1, 2, 2), tokens=12, blocks=1, device="cpu", out=tmp_path))
    found = {row["variant"]: row for row in rows}
    assert found["torch"]["status"] == "ok"
    assert found[whole.OURS]["status"] == "failed"
    assert "FLASHBIAS_DISABLE" in found[whole.OURS]["reason"]


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("forward_teams_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x64", "attention"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 11, false, false>", "attention"),
        ("nvjet_sm90_tst_128x128_64x6_2x1_v_bz_bias_TNT", "products"),
        ("aten::bmm", "products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "products"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>", "norms"),
        ("norm_kernel", "norms"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::sigmoid_kernel_cuda>", "elementwise"),
        ("aten::mul", "elementwise"),
        ("aten::normal_", "elementwise"),  # the diffusion's noise
        ("spin", "others"),
    ],
)
def test_kernels_have_families(kernel, family):
    assert profile.family(kernel) == family


def test_profile_says_where_the_time_goes(tmp_path):
    options = (*SMALL, "--kernels", "torch,flashbias", "--stages", "trunk,diffusion", "--out", str(tmp_path))
    result = CliRunner().invoke(app, ["protenix", "profile", *options])
    assert result.exit_code == 0, result.output
    with (tmp_path / "protenix_profile.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    parts = {(row["stage"], row["kernel"]) for row in rows}
    assert parts == {(stage, kernel) for stage in ("trunk", "diffusion") for kernel in ("torch", "flashbias")}
    for part in parts:
        some = [row for row in rows if (row["stage"], row["kernel"]) == part]
        assert [row["family"] for row in some] == [*profile.FAMILIES, profile.OTHERS]
        assert sum(float(row["share"]) for row in some) == pytest.approx(1, abs=1e-3)
        by_family = {row["family"]: row for row in some}
        for name in ("products", "norms", "elementwise"):
            assert float(by_family[name]["ms"]) > 0
            assert float(by_family[name]["launches"]) > 0
            assert profile.family(by_family[name]["longest"]) == name
    assert (tmp_path / "protenix_profile.png").stat().st_size > 1000
    spent = json.loads(result.stdout.splitlines()[-1])["milliseconds"]
    assert spent.keys() == {", ".join(part) for part in parts}


def test_profile_refuses_what_it_does_not_know(tmp_path):
    for option, value in (("--stages", "lunch"), ("--kernels", "abacus")):
        result = CliRunner().invoke(app, ["protenix", "profile", *SMALL, option, value, "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        assert not (tmp_path / "out").exists()
