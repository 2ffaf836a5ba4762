"""SwinV2: what the replacement computes, against the hosts' own code on the same weights."""

import copy
import functools
import inspect
import io
import pickle

import pytest
import torch
from torch.utils import checkpoint

from flashbias.integrations.segments import segment_ids
from flashbias.testing import assert_as_accurate

from .conftest import DEVICE, both_hosts, give_structure


def attention_and_mask(host, window, shifted, images=2, dim=32, heads=4, **options):
    """One attention of a block over 2 x 3 windows, its mask or None, and an input for several images."""
    make_block = getattr(host, "SwinTransformerV2Block", None) or host.SwinTransformerBlock
    block = make_block(
        dim, (2 * window, 3 * window), heads, window_size=window, shift_size=window // 2 if shifted else 0, **options
    )
    attention = give_structure(block.attn).to(DEVICE)
    x = torch.randn(images * 6, window**2, dim, device=DEVICE)
    return attention, None if block.attn_mask is None else block.attn_mask.to(DEVICE), x


def run(attention, x, mask, autocast=False, dtype=torch.float32):
    """Output, and the gradients of the input and of every parameter, by name.

    A parameter's is a sum over all rows of x: divided by the root of their number it is as large as a single one.
    """
    attention = copy.deepcopy(attention).to(dtype)
    x = x.detach().to(dtype).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        out = attention(x, mask=None if mask is None else mask.to(dtype))
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).sin().to(out.dtype))
    rows = x.shape[0] * x.shape[1]
    gradients = {name: parameter.grad / rows**0.5 for name, parameter in attention.named_parameters()}
    return {"out": out, "x": x.grad, **gradients}


def assert_like_the_host(host, stock, window, shifted, training=False, autocast=False, **options):
    oracle, theirs, ours = [], [], []
    for _ in range(8):  # the error of four logit scales alone says little about what the host reaches
        attention, mask, x = attention_and_mask(host, window, shifted, **options)
        assert (mask is not None) == shifted
        attention.train(training)
        with stock():
            oracle.append(run(attention, x, mask, dtype=torch.float64))
            theirs.append(run(attention, x, mask, autocast))
        ours.append(run(attention, x, mask, autocast))
    for name in oracle[0]:
        results = [torch.stack([draw[name] for draw in draws]) for draws in (ours, theirs, oracle)]
        assert results[0].abs().max() > 0
        assert_as_accurate(name, *results, torch.bfloat16 if autocast else torch.float32)


@pytest.mark.parametrize(
    ("host", "window", "shifted", "training", "autocast"),
    [
        ("timm", 4, False, False, False),
        ("timm", 4, True, True, True),
        ("timm", 7, False, False, True),
        ("timm", 7, True, True, False),
        ("timm", 8, False, True, True),
        ("timm", 8, True, False, False),
        ("microsoft", 4, True, True, False),
        ("microsoft", 7, False, False, False),
        ("microsoft", 7, True, False, True),
    ],
    indirect=["host"],
)
def test_output_and_gradients_are_those_of_the_host(host, stock, window, shifted, training, autocast):
    assert_like_the_host(host, stock, window, shifted, training, autocast)


@both_hosts
@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"pretrained_window_size": 12}], ids=str)
def test_options_of_the_attention(host, stock, options):
    assert_like_the_host(host, stock, 6, True, **options)


def test_separate_bias_of_the_projection(host, swin_v2, stock):
    attention = give_structure(host.WindowAttention(32, (4, 4), 4)).to(DEVICE)
    attention.qkv_bias_separate = True
    x = torch.randn(5, 16, 32, device=DEVICE)
    with stock():
        oracle, timm = run(attention, x, None, dtype=torch.float64), run(attention, x, None)
    assert_as_accurate("out", run(attention, x, None)["out"], timm["out"], oracle["out"], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_model_in_half_precision(host, swin_v2, stock, dtype):
    attention, mask, x = attention_and_mask(host, 4, True)
    attention.eval()
    with torch.no_grad(), stock():
        oracle = attention.double()(x.double(), mask.double())
        attention.to(dtype)
        timm = attention(x.to(dtype), mask.to(dtype))
    with torch.no_grad():
        ours = attention(x.to(dtype), mask.to(dtype))
    assert ours.dtype == dtype
    assert_as_accurate("out", ours, timm, oracle, dtype)


@pytest.mark.parametrize(
    ("host", "training"), [("timm", False), ("timm", True), ("microsoft", True)], indirect=["host"]
)
def test_whole_model(swin_v2, stock, make_model, training):
    model = make_model().train(training)
    image = torch.randn(3, 1, 32, 32, device=DEVICE)

    def logits_and_gradients():
        model.zero_grad()
        logits = model(image)
        logits.square().sum().backward()
        return logits, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    with stock():
        expected, expected_gradients = logits_and_gradients()
    logits, gradients = logits_and_gradients()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("window", [(4, 4), (7, 7), (16, 16), (32, 32), (4, 6)], ids=str)
def test_segments_are_the_mask_bit_for_bit(host, window):
    block = host.SwinTransformerV2Block(
        4, (2 * window[0], 3 * window[1]), 1, window_size=window, shift_size=(window[0] // 2, window[1] // 2)
    )
    ids = segment_ids(block.attn_mask)
    assert ids.shape == (6, window[0] * window[1])
    assert ids.min() >= 0, "-1 would attend nowhere"
    assert torch.equal(ids[:, :, None] != ids[:, None, :], block.attn_mask != 0)


def test_images_of_any_size(host, swin_v2, stock, make_model):
    if "dynamic_img_size" not in inspect.signature(host.SwinTransformerV2).parameters:
        pytest.skip("this timm takes images of one size")
    model = make_model(dynamic_img_size=True)
    for size in ((32, 32), (48, 32)):
        image = torch.randn(2, 1, *size, device=DEVICE)
        with torch.no_grad():
            ours = model(image)
            with stock():
                torch.testing.assert_close(ours, model(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(swin_v2, make_model, reentrant):
    image = torch.randn(2, 1, 32, 32, device=DEVICE)
    model = make_model().train()
    model(image).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for stage in model.layers:
        for block in stage.blocks:
            block.forward = functools.partial(checkpoint.checkpoint, block.forward, use_reentrant=reentrant)
    model(image).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def logits(model, image):
    with torch.no_grad():
        return model(image)


@pytest.fixture
def made(swin_v2, monkeypatch):
    """A list that gets an entry whenever a table is made; only tables are made."""
    calls = []
    gather = swin_v2._gather_bias

    def counting(*args):
        calls.append(1)
        return gather(*args)

    monkeypatch.setattr(swin_v2, "_gather_bias", counting)
    swin_v2.configure(mode="exact")
    return calls


@both_hosts
def test_table_is_made_once_until_the_weights_change(swin_v2, stock, make_model, made):
    model, other = make_model(), make_model()
    image = torch.randn(2, 1, 32, 32, device=DEVICE)

    def assert_fresh(tables, image=image):
        made.clear()
        ours = logits(model, image)
        assert len(made) == tables
        logits(model, image)
        assert len(made) == tables, "made once"
        with stock():
            torch.testing.assert_close(ours, logits(model, image), rtol=2e-2, atol=2e-2)
        return ours

    first = assert_fresh(4)
    model.load_state_dict(other.state_dict())
    assert not torch.allclose(first, assert_fresh(4), atol=1e-2), "the bias has no effect"
    model.load_state_dict(other.state_dict(), assign=True)
    assert_fresh(4)
    with torch.no_grad():
        model.layers[0].blocks[0].attn.cpb_mlp[2].weight.mul_(2)
    assert_fresh(1)
    model.layers[0].blocks[0].attn.cpb_mlp[2].weight.data.mul_(0.5)
    model.eval()
    assert_fresh(4)
    model.layers[0].blocks[0].attn.cpb_mlp[2].weight.data.mul_(2)
    swin_v2.forget(model)
    assert_fresh(4)
    blocks = [block.attn for stage in model.layers for block in stage.blocks]
    blocks[2].cpb_mlp[2].weight.grad = torch.ones_like(blocks[2].cpb_mlp[2].weight)
    torch.optim.AdamW(blocks[2].parameters(), lr=0.1, fused=True).step()
    assert_fresh(1)
    if hasattr(model, "set_input_size"):  # timm's, newer than 1.0.3
        model.set_input_size((64, 64), window_size=8)
        image = torch.randn(1, 1, 64, 64, device=DEVICE)
        assert_fresh(4, image)
    model.to(torch.float16)
    assert_fresh(4, image.half())


def test_training_does_not_keep_tables(swin_v2, make_model, made):
    model = make_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    image = torch.randn(2, 1, 32, 32, device=DEVICE)
    for _ in range(2):
        made.clear()
        model(image).sum().backward()
        optimizer.step()
        assert len(made) == 4
    before = logits(model.eval(), image)
    optimizer.step()
    made.clear()
    assert not torch.equal(logits(model, image), before)
    assert len(made) == 4


@pytest.mark.parametrize("mode", ["exact", "factored"])
def test_what_is_kept_is_part_of_no_state(swin_v2, make_model, mode):
    swin_v2.configure(mode=mode)
    model = make_model()
    image = torch.randn(2, 1, 32, 32, device=DEVICE)
    keys = list(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    expected = logits(model, image)
    assert list(model.state_dict()) == keys
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(logits(twin, image), expected)
        with torch.no_grad():
            twin.layers[0].blocks[0].attn.cpb_mlp[2].weight.neg_()
        assert not torch.allclose(logits(twin, image), expected, atol=1e-3)
        assert torch.equal(logits(model, image), expected)


def test_tables_made_in_inference_mode_serve_autograd(swin_v2, make_model):
    model = make_model()
    image = torch.randn(2, 1, 32, 32, device=DEVICE)
    with torch.inference_mode():
        expected = model(image)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("cpb_mlp" not in name)
    result = model(image)
    result.sum().backward()
    assert model.layers[0].blocks[0].attn.qkv.weight.grad.abs().max() > 0
    torch.testing.assert_close(result, expected)


def test_weights_made_in_inference_mode(swin_v2, stock, make_model):
    image = torch.randn(2, 1, 32, 32, device=DEVICE)
    with torch.inference_mode():
        model = make_model()
        ours = model(image)
        with stock():
            torch.testing.assert_close(ours, model(image), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_captured_graph_follows_the_weights(swin_v2, make_model):
    model, other = make_model(), make_model()
    image = torch.randn(2, 1, 32, 32, device=DEVICE)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(image)  # keeps tables, which the graph must not read
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = model(image)
        model.load_state_dict(other.state_dict())
        graph.replay()
        torch.testing.assert_close(result, other(image))
        torch.testing.assert_close(result, model(image))
