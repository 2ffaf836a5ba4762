"""SwinV2: the patch in its host. When it runs, when it hands over, and how it is taken out."""

import copy
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from torch.autograd import forward_ad

from flashbias.patches import PatchedOnTopError, SignatureChangedError, UnsupportedVersionError

from .conftest import DEVICE, both_hosts

BLOCKS = 2


@pytest.fixture
def image():
    return torch.randn(2, 1, 32, 32, device=DEVICE)


@pytest.fixture
def calls(swin_v2, monkeypatch):
    """A list that gets an entry whenever the replacement calls the operator."""
    made = []
    operator = swin_v2.biased_attention

    def counting(*args, **kwargs):
        made.append(1)
        return operator(*args, **kwargs)

    monkeypatch.setattr(swin_v2, "biased_attention", counting)
    return made


class Graphs:
    """A backend that keeps the graphs it is given and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph_module, inputs):
        self.graphs.append(graph_module.graph)
        return graph_module.forward

    def count(self, name):
        return [sum(name in str(node.target) for node in graph.nodes) for graph in self.graphs]


@both_hosts
def test_replacement_is_called_in_eager_mode(swin_v2, small_model, image, calls):
    model = small_model()
    with torch.no_grad():
        model(image)
    assert len(calls) == BLOCKS
    swin_v2.revert()
    model(image)
    assert len(calls) == BLOCKS


@both_hosts
@pytest.mark.parametrize("recorded", [False, True], ids=["inference", "training"])
def test_replacement_is_called_under_compile(swin_v2, stock, small_model, image, recorded):
    model = small_model().train(recorded)
    backend = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.set_grad_enabled(recorded):
        ours = compiled(image)
    assert backend.count("swin_v2_attention") == [0 if recorded else BLOCKS]
    assert backend.count("flashbias") == [BLOCKS]
    assert backend.count("softmax") == [0]
    with stock():
        torch.testing.assert_close(ours, model(image), rtol=1e-4, atol=1e-4)


def test_compiled_model_sees_patch_and_revert(swin_v2, small_model, image):
    model = small_model()
    backend = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for switch in (swin_v2.revert, swin_v2.apply, swin_v2.revert):
            switch()
            compiled(image)
            compiled(image)
    assert backend.count("flashbias") == [0, BLOCKS, 0]


@both_hosts
def test_compiled_model_follows_the_weights(swin_v2, small_model, image):
    model, other = small_model(), small_model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(image)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(compiled(image), other(image))


def test_compiled_training_through_autograd(swin_v2, small_model, image):
    model = small_model().train()
    model(image).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(image).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_compiled_autocast(swin_v2, small_model, image):
    model = small_model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        torch.testing.assert_close(compiled(image), model(image))


def test_other_batch_sizes_do_not_recompile(swin_v2, small_model):
    backend = Graphs()
    compiled = torch.compile(small_model(), fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for images in (2, 3, 7):
            compiled(torch.randn(images, 1, 32, 32, device=DEVICE))
    assert len(backend.graphs) == 1


no_strict_export = pytest.mark.xfail(
    torch.__version__ < "2.8",
    reason="torch 2.7 cannot tell that a graph is for a strict export: it gets what graphs of torch.compile get",
    raises=AssertionError,
    strict=True,
)


@pytest.mark.parametrize(
    ("host", "strict"),
    [("timm", False), pytest.param("timm", True, marks=no_strict_export), ("microsoft", False)],
    indirect=["host"],
)
def test_export(swin_v2, small_model, image, strict):
    """The exported program needs nothing but `flashbias`: its graph makes the exact bias from the weights."""
    swin_v2.configure(mode="factored", rank=2)
    model = small_model()
    with torch.no_grad():
        program = torch.export.export(model, (image,), strict=strict)
        targets = [str(node.target) for node in program.graph.nodes]
        assert targets.count("flashbias.attention.default") == BLOCKS
        assert not any("swin_v2_attention" in target for target in targets)
        swin_v2.configure(mode="exact")
        torch.testing.assert_close(program.module()(image), model(image))


@pytest.mark.parametrize("tracer", ["jit.script", "jit.trace", "fx.symbolic_trace"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_older_tracers_find_the_code_of_timm(swin_v2, stock, small_model, image, tracer):
    model = small_model()
    with torch.no_grad():
        with stock():
            expected = model(image)
        if tracer == "jit.script":
            traced = torch.jit.script(model)
            operations = str(traced.inlined_graph)
        elif tracer == "jit.trace":
            traced = torch.jit.trace(model, image)
            operations = str(traced.inlined_graph)
        else:
            traced = torch.fx.symbolic_trace(model)
            operations = str(traced.graph)
        assert "softmax" in operations
        assert "flashbias" not in operations.replace("_before_flashbias", "")
        torch.testing.assert_close(traced(image), expected)


@both_hosts
def test_revert_gives_back_the_identical_code(swin_v2, host, small_model, image):
    swin_v2.revert()
    before = dict(vars(host.WindowAttention))
    model = small_model()
    expected = model(image)
    swin_v2.apply()
    assert swin_v2.is_applied()
    assert vars(host.WindowAttention)["forward"] is swin_v2.forward
    assert not torch.equal(model(image), expected), "another order of summation shows in the last bits"
    swin_v2.revert()
    assert not swin_v2.is_applied()
    after = dict(vars(host.WindowAttention))
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert torch.equal(model(image), expected)


def test_disabled_by_the_environment(swin_v2, host, monkeypatch):
    swin_v2.revert()
    monkeypatch.setenv("FLASHBIAS_DISABLE", "1")
    assert swin_v2.apply() is False
    assert not swin_v2.is_applied()
    assert host.WindowAttention.forward.__module__ == host.__name__


def test_unsupported_version_is_refused(swin_v2, host, monkeypatch):
    swin_v2.revert()
    monkeypatch.setattr(metadata, "version", lambda name: "0.9.16")
    with pytest.raises(UnsupportedVersionError, match=r"timm 0\.9\.16"):
        swin_v2.apply()
    assert host.WindowAttention.forward.__module__ == host.__name__


@both_hosts
def test_changed_signature_is_refused(swin_v2, host, monkeypatch):
    swin_v2.revert()

    def forward(self, x, mask=None, rope=None):
        return x

    monkeypatch.setattr(host.WindowAttention, "forward", forward)
    with pytest.raises(SignatureChangedError, match="rope"):
        swin_v2.apply()
    assert host.WindowAttention.forward is forward


@both_hosts
def test_third_party_on_top_is_not_undone(swin_v2, host, small_model, image, monkeypatch):
    with monkeypatch.context() as context:
        ours = host.WindowAttention.forward
        theirs = lambda self, x, mask=None: ours(self, x, mask) * 2  # noqa: E731 - as a third party would
        context.setattr(host.WindowAttention, "forward", theirs)
        with pytest.raises(PatchedOnTopError):
            swin_v2.revert()
        assert host.WindowAttention.forward is theirs
        small_model()(image)
    assert swin_v2.revert()


def mask_of_another_kind(model, image):
    attention = model.layers[0].blocks[0].attn
    x, mask = torch.randn(4, 16, 16, device=DEVICE), torch.randn(2, 16, 16, device=DEVICE)
    return attention(x, mask)


def with_hooks_on_the_weights(model, image):
    seen = []
    attention = model.layers[0].blocks[0].attn
    handles = [
        attention.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out)),
        attention.softmax.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
    ]
    result = model(image)
    for handle in handles:
        handle.remove()
        model(image)
    assert [tuple(weights.shape) for weights in seen] == [(2 * 16, 2, 16, 16)] * 3
    return result


class SoftmaxWithOne(torch.nn.Module):
    """Attention may go nowhere."""

    def forward(self, scores):
        return torch.nn.functional.pad(scores, (0, 1)).softmax(-1)[..., :-1]


def with_another_softmax(model, image):
    model.layers[0].blocks[0].attn.softmax = SoftmaxWithOne()
    return model(image)


def gradient_by_transform(model, image):
    return torch.func.grad(lambda image: model(image).square().sum())(image)


def one_image_at_a_time(model, image):
    return torch.func.vmap(lambda one: model(one[None])[0])(image)


def directional_derivative(model, image):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(image, torch.ones_like(image)))).tangent


@pytest.mark.parametrize(
    ("options", "call", "reason"),
    [
        ({"attn_drop_rate": 0.5}, lambda model, image: model.train()(image), "attention dropout in training"),
        ({}, lambda model, image: model.double()(image.double()), "torch.float64"),
        ({}, mask_of_another_kind, "a mask that is not one of a shifted window"),
        ({}, with_hooks_on_the_weights, "a hook on the attention weights"),
        ({}, with_another_softmax, "a softmax or dropout of another make"),
        ({}, gradient_by_transform, "a transform of torch.func"),
        ({}, one_image_at_a_time, "a transform of torch.func"),
        ({}, directional_derivative, "forward-mode differentiation"),
        ({}, lambda model, image: model.to("meta")(image.to("meta")).shape, "a tensor on meta"),
    ],
    ids=["dropout", "float64", "mask", "hook", "softmax", "grad", "vmap", "forward mode", "meta"],
)
def test_what_is_not_covered_is_handed_over_and_said_once(
    swin_v2, stock, small_model, image, caplog, options, call, reason
):
    model = small_model(**options)
    with stock():
        torch.manual_seed(7)
        expected = call(copy.deepcopy(model), image)
    for _ in range(2):
        torch.manual_seed(7)
        torch.testing.assert_close(call(copy.deepcopy(model), image), expected, rtol=1e-4, atol=1e-4)
    assert sum(reason in record.message for record in caplog.records) == 1


def test_dropout_is_handed_over_under_compile_too(swin_v2, small_model, image, caplog):
    backend = Graphs()
    torch.compile(small_model(attn_drop_rate=0.5).train(), fullgraph=True, backend=backend)(image)
    assert backend.count("flashbias") == [0]
    assert sum("attention dropout in training" in record.message for record in caplog.records) == 1


def test_dropout_in_evaluation_is_covered(swin_v2, small_model, image, calls):
    small_model(attn_drop_rate=0.5)(image)
    assert len(calls) == BLOCKS


LATER = """
import sys, warnings
warnings.simplefilter("error", UserWarning)
import flashbias.integrations.swin_v2 as swin_v2
assert "timm" not in sys.modules and not swin_v2.is_applied()
from flashbias.integrations._torchvision import make_importable
make_importable()
import timm.models.swin_transformer_v2 as host
print(swin_v2.is_applied(), host.WindowAttention.forward.__module__)
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "True flashbias.integrations.swin_v2"),
        ({"FLASHBIAS_DISABLE": "1"}, "False timm.models.swin_transformer_v2"),
    ],
    ids=["enabled", "disabled"],
)
def test_timm_is_patched_when_it_is_imported_later(host, environment, expected):
    process = subprocess.run(
        [sys.executable, "-c", LATER], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert process.stdout.strip() == expected, process.stderr
