"""The neural solver: how the patch gets into a checkout and out again, and what it leaves alone."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flashbias.integrations import profile, verify
from flashbias.patches import HostMissingError, OtherHostError, PatchedOnTopError, PatchWarning, SignatureChangedError
from flashbias.recipes.neural_solver import stand_ins
from flashbias.recipes.neural_solver.model import CAR, ELASTICITY, Solver, host_model

from .conftest import CHECKOUT, DEVICE, STAND_IN, options

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
MODEL = Path("models", "Transformer_Spatial_Bias.py")


def targets(host):
    kernels = importlib.import_module("layers.flash_bias_triton")
    return [
        vars(host.Spatial_Bias_Attention)["forward"],
        vars(host.Model)["get_matrix"],
        kernels.flash_bias_func,
        host.flash_bias_func,
        torch.Tensor.cuda,
        torch.nn.Module.cuda,
    ]


def attributes(host):
    kernels = importlib.import_module("layers.flash_bias_triton")
    owners = (host, host.Model, host.Spatial_Bias_Attention, kernels, torch.Tensor, torch.nn.Module)
    return [set(vars(owner)) for owner in owners]


@pytest.fixture
def checkout(tmp_path):
    """`checkout(source)` makes a copy of the stand-in with that source of its model."""

    def make(source):
        shutil.copytree(STAND_IN, tmp_path / "copy")
        (tmp_path / "copy" / MODEL).write_text(source)
        return tmp_path / "copy"

    return make


SOURCE = (STAND_IN / MODEL).read_text()


def test_patched_when_imported_and_reverted_to_the_identical_objects(neural_solver, host):
    assert neural_solver.is_applied()
    assert all(function.__module__.startswith("flashbias.") for function in targets(host)[:4])
    neural_solver.revert()
    before, names = targets(host), attributes(host)
    assert not any(getattr(function, "__module__", "").startswith("flashbias.") for function in before[:3])
    assert host.flash_bias_func is before[2]
    for _ in range(2):
        assert neural_solver.apply() is True
        assert neural_solver.apply() is False
        assert neural_solver.revert() is True
        assert neural_solver.revert() is False
        assert all(now is then for now, then in zip(targets(host), before, strict=True))
        assert attributes(host) == names


def test_parameters_are_those_of_the_host_bit_for_bit(neural_solver, host, stock):
    def weights():
        torch.manual_seed(3)
        return host.Model(options(3, 7)).state_dict()

    patched = weights()
    with stock():
        plain = weights()
    assert list(patched) == list(plain)
    assert all(torch.equal(patched[name], plain[name]) for name in plain)


def test_checkpoints_of_the_stock_model_load_and_compute_the_same_as_the_weights(neural_solver, host, stock, tmp_path):
    with stock():
        stock_model = host.Model(options(3, 7))
        torch.save(stock_model.state_dict(), tmp_path / "stock.pt")
    model = host.Model(options(3, 7)).to(DEVICE)
    model.load_state_dict(torch.load(tmp_path / "stock.pt"))
    points, features = torch.rand(1, 30, 3, device=DEVICE), torch.rand(1, 30, 7, device=DEVICE)
    with torch.no_grad():
        assert torch.equal(model(points, features), stock_model.to(DEVICE)(points, features))
    torch.save(model.state_dict(), tmp_path / "patched.pt")
    with stock():
        host.Model(options(3, 7)).load_state_dict(torch.load(tmp_path / "patched.pt"))


@pytest.mark.parametrize("shape", [ELASTICITY, CAR], ids=["elasticity", "car"])
def test_model_of_the_recipe_has_the_parameters_of_the_host(host, shape):
    theirs = host_model(Path(CHECKOUT), shape)
    assert type(theirs) is host.Model
    ours = Solver(shape, lambda points: points, lambda layer, x, points: x).state_dict()
    assert {name: weight.shape for name, weight in theirs.state_dict().items()} == {
        name: weight.shape for name, weight in ours.items()
    }


def test_like_the_hosts_own_code_on_a_body_at_the_origin(neural_solver, make_model, stock):
    """Where half precision holds coordinates well, and points are such that it holds them exactly."""
    model = make_model(2)
    x = torch.randn(1, 50, 32, device=DEVICE)
    points = torch.randint(-8, 9, (1, 50, 2), device=DEVICE) / 8.0
    factors = [factor.cuda() if DEVICE == "cuda" else factor for factor in model.get_matrix(points)]
    attention = model.blocks[0].Attn
    with torch.no_grad():
        ours = attention(x, *factors)
        with stock():
            theirs = attention(x, *factors) if str(STAND_IN) == CHECKOUT else None
    if theirs is not None:  # a real checkout's kernel needs a GPU, and reads beyond the end of 50 points there
        assert not torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_number_of_calls_eager_and_compiled(neural_solver, make_model, monkeypatch):
    made = []
    operator = neural_solver.attention.biased_attention
    monkeypatch.setattr(
        neural_solver.attention, "biased_attention", lambda *args, **kwargs: made.append(1) or operator(*args, **kwargs)
    )
    model, points = make_model(2), torch.rand(1, 20, 2, device=DEVICE)
    expected = model(points, None)
    assert len(made) == 2
    monkeypatch.undo()
    graphs = []

    def backend(module, inputs):
        graphs.append(sum("flashbias" in str(node.target) for node in module.graph.nodes))
        return module.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(points, None), expected)
    assert graphs == [2]


@pytest.mark.parametrize("precision", ["single", "half"])
def test_compiled_training(neural_solver, make_model, precision):
    neural_solver.configure(precision=precision)
    model, points = make_model(3), torch.rand(1, 20, 3, device=DEVICE)

    def gradients(model):
        model.zero_grad()
        (1e-6 * model(points, None).square().mean()).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients(model)
    for ours, wanted in zip(
        gradients(torch.compile(model, fullgraph=True, backend="aot_eager")), expected, strict=True
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.skipif(
    torch.cuda.is_available() and str(STAND_IN) != CHECKOUT,
    reason="the library's own kernel ends with an illegal memory access under triton 3.6, and with it the process",
)
def test_differences_and_times_of_layers_are_reported(neural_solver, make_model, monkeypatch):
    monkeypatch.setenv("FLASHBIAS_VERIFY", "1")
    monkeypatch.setenv("FLASHBIAS_PROFILE", "1")
    model, points = make_model(2), torch.rand(1, 20, 2, device=DEVICE)
    model(points, None)
    found = verify.differences()
    assert [entry.layer for entry in found] == ["blocks.0.Attn", "blocks.1.Attn"]
    assert all(0 < entry.difference < 0.05 * entry.largest for entry in found), "the host rounds to half precision"
    assert [entry.layer for entry in profile.timings()] == ["blocks.0.Attn", "blocks.1.Attn"]
    assert not verify.comparing()


def test_disabled_by_the_environment(neural_solver, load, monkeypatch):
    monkeypatch.setenv("FLASHBIAS_DISABLE", "1")
    host = load(CHECKOUT)
    assert not neural_solver.is_applied()
    assert neural_solver.apply() is False
    assert host.Model.get_matrix.__module__ == host.__name__


def test_what_is_not_covered_is_handed_over_and_said_once(neural_solver, make_model, caplog):
    """A hook on the weights wants to see and change what the host makes of them."""
    model, x = make_model(2), torch.randn(1, 20, 32, device=DEVICE)
    attention, factors = model.blocks[0].Attn, model.get_matrix(torch.rand(1, 20, 2, device=DEVICE))
    seen = []
    attention.pos_weight.register_forward_hook(lambda module, args, out: seen.append(out) or 0 * out)
    with torch.no_grad():
        made = [attention(x, *factors) for _ in range(2)]
        attention.pos_weight._forward_hooks.clear()
        attention.pos_weight.weight.zero_()
        torch.testing.assert_close(made[1], attention(x, *factors), rtol=0.01, atol=0.01)
    assert len(seen) == 2
    assert sum("a hook on pos_weight" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("arguments", "found"), [({"precision": "fp8"}, "fp8"), ({"precision": ""}, "precision=''")], ids=str
)
def test_settings_that_there_are_not(neural_solver, arguments, found):
    with pytest.raises(neural_solver.PrecisionError, match=found):
        neural_solver.configure(**arguments)


OTHERS = {
    "empty": "",
    "another attention": "class Spatial_Bias_Attention:\n    def forward(self, x, q_bias, k_bias):\n        return x\n",
    "a fork with other parts": SOURCE.replace("self.scale)", "self.scale * self.dim_head)"),
}


@pytest.mark.parametrize("source", OTHERS.values(), ids=OTHERS)
def test_another_projects_models_are_left_alone_and_refused_by_name(neural_solver, load, checkout, source):
    folder = checkout(source)
    host = load(folder)
    assert not neural_solver.INTEGRATION.hosts[0].is_applied()
    assert not any("flashbias" in vars(item)["forward"].__module__ for item in vars(host).values() if is_module(item))
    with pytest.raises(OtherHostError, match="which is other code"):
        neural_solver.apply()
    with pytest.raises(OtherHostError, match="Neural-Solver-Library"):
        neural_solver.find(folder)


def is_module(item):
    return isinstance(item, type) and issubclass(item, torch.nn.Module) and "forward" in vars(item)


def test_folder_that_is_no_checkout(neural_solver, tmp_path):
    with pytest.raises(HostMissingError, match="name its top folder"):
        neural_solver.find(tmp_path)
    with pytest.raises(HostMissingError, match=r"no module models\.Transformer_Spatial_Bias"):
        neural_solver.apply()
    assert neural_solver.find(CHECKOUT) == Path(CHECKOUT).absolute()


def test_changed_signature_is_refused(neural_solver, load, checkout):
    folder = checkout(
        SOURCE.replace("def forward(self, x, q_bias, k_bias)", "def forward(self, x, q_bias, k_bias, rope)")
    )
    with pytest.warns(PatchWarning, match="rope"):
        load(folder)
    with pytest.raises(SignatureChangedError, match="rope"):
        neural_solver.apply()


def test_third_party_on_top_is_not_undone(neural_solver, host, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(host.Model, "get_matrix", lambda self, original_pos: None)
        with pytest.raises(PatchedOnTopError):
            neural_solver.revert()
    assert neural_solver.revert()


@no_gpu
def test_cuda_is_left_out_in_the_checkouts_files_and_nowhere_else(neural_solver, host):
    with pytest.raises(Exception, match=r"CUDA|NVIDIA|driver"):
        torch.ones(1).cuda()
    with pytest.raises(Exception, match=r"CUDA|NVIDIA|driver"):
        torch.nn.Linear(1, 1).cuda()
    folder = Path(host.__file__).parents[1]
    code = compile("x.cuda() is x and model.cuda(0) is model", str(folder / "exp" / "exp_basic.py"), "eval")
    assert eval(code, {"x": torch.ones(1), "model": torch.nn.Linear(1, 1)})


def start(program, *arguments, cwd=CHECKOUT, **environment):
    """Run Python in the checkout, torchvision importable."""
    first = "from flashbias.integrations._torchvision import make_importable; make_importable()\n"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", first + program, *arguments],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
sys.path.insert(0, "")
import torch
from flashbias.integrations import neural_solver
from models.Transformer_Spatial_Bias import Model, flash_bias_func
from types import SimpleNamespace
assert neural_solver.is_applied()
model = Model(SimpleNamespace(unified_pos=0, geotype="unstructured", time_input=False, act="gelu", dropout=0.0,
    n_hidden=16, n_heads=2, n_layers=1, mlp_ratio=1, out_dim=1, space_dim=2, fun_dim=0))
model(torch.rand(1, 30, 2), None).sum().backward()
print(all(parameter.grad.isfinite().all() for parameter in model.parameters()), flash_bias_func.__module__)
"""


@no_gpu
def test_model_trains_without_triton_and_gpu():
    done = start(WITHOUT_TRITON)
    assert done.stdout.split() == ["True", "flashbias.integrations.neural_solver.attention"], done.stderr
    assert "layers.flash_bias_triton cannot be imported here" in done.stderr


RUN = "import sys; from flashbias.recipes.cli import main; sys.argv[0] = 'flashbias'; sys.path[0] = ''; main()"


@no_gpu
def test_disabled_by_the_environment_the_stock_code_fails_as_ever():
    done = start(WITHOUT_TRITON, FLASHBIAS_DISABLE="1")
    assert done.returncode == 1
    assert "triton" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("space", ["2", "3"])
def test_entry_point_of_the_library_runs_patched(space):
    """`flashbias run --patch neural_solver -- run.py` in a checkout, the arguments being the script's."""
    done = start(RUN, "run", "--patch", "neural_solver", "--verify", "--", "run.py", "--space_dim", space, cwd=STAND_IN)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert "worst difference" in done.stderr
    assert "was not applied" not in done.stderr


def run_script(script, checkout, data, *arguments, packages=()):
    """Run a script of the recipe, torchvision importable, further packages before others."""
    path = Path(__file__).parents[3] / "recipes" / "neural_solver" / script
    (data / "sitecustomize.py").write_text(
        "from flashbias.integrations._torchvision import make_importable\nmake_importable()\n"
    )
    folders = [str(data), *map(str, packages), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(folders),
    }
    return subprocess.run(
        ["bash", path, checkout, data, *arguments],
        cwd=data, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.skipif(str(STAND_IN) == CHECKOUT, reason="no real checkout is named")
def test_run_py_of_a_real_checkout_trains_and_evaluates(tmp_path):
    """With the arguments of the library's script, but for a small case."""
    shutil.copytree(CHECKOUT, tmp_path / "copy", ignore=shutil.ignore_patterns(".git"))
    meshes = tmp_path / "elasticity" / "Meshes"
    meshes.mkdir(parents=True)
    points = np.random.default_rng(0).random((60, 2, 6))
    np.save(meshes / "Random_UnitCell_XY_10.npy", points)
    np.save(meshes / "Random_UnitCell_sigma_10.npy", 100 + 50 * np.sin(6 * points[:, 0]))
    stand_ins.write(tmp_path / "packages")
    small = ("--ntrain", "4", "--ntest", "2", "--n_layers", "2", "--epochs", "3")
    done = run_script("elasticity.sh", tmp_path / "copy", tmp_path, *small, packages=[tmp_path / "packages"])
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("Epoch")]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert "was not applied" not in done.stderr
    assert "was applied, but" not in done.stderr


@pytest.mark.parametrize(("script", "data"), [("elasticity.sh", "elasticity/Meshes"), ("car.sh", "training_data")])
def test_scripts_run_the_library_patched_on_data_that_are_there(tmp_path, script, data):
    (tmp_path / data).mkdir(parents=True)
    done = run_script(script, STAND_IN, tmp_path, "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("Epoch") for line in done.stdout.splitlines()) == 2
    assert "was not applied" not in done.stderr


def test_command_refuses_a_folder_that_is_no_checkout_by_name(tmp_path):
    done = start(RUN, "neural-solver", "checkout", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert "wanted: a checkout of github.com/thuml/Neural-Solver-Library; remedy:" in done.stderr
    assert start(RUN, "neural-solver", "checkout", str(STAND_IN), cwd=tmp_path).returncode == 0


def test_run_says_so_where_there_is_no_checkout(tmp_path):
    (tmp_path / "script.py").write_text("print('ran')")
    done = start(RUN, "run", "--patch", "neural_solver", "--", "script.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert "neural_solver was not applied" in done.stderr
    assert "no module models.Transformer_Spatial_Bias" in done.stderr
