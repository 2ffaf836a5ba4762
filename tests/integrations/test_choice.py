"""SwinV2: exact or factored. What is chosen, when it is made anew, and that compiled graphs follow."""

import pytest
import torch

from flashbias import decompose, plan
from flashbias.biases import DenseBias, FactoredBias
from flashbias.integrations import choice
from flashbias.integrations.choice import Choice, ConfigurationError, Settings
from flashbias.testing import assert_as_accurate

from .conftest import DEVICE, both_hosts

NAMES = ["layers.0.blocks.0.attn", "layers.0.blocks.1.attn"]


@pytest.fixture
def image():
    return torch.randn(2, 1, 32, 32, device=DEVICE)


@pytest.fixture
def found(monkeypatch):
    """A list that gets every decomposition that is made."""
    made = []
    svd = decompose.svd

    def counting(*args, **options):
        made.append(svd(*args, **options))
        return made[-1]

    monkeypatch.setattr(decompose, "svd", counting)
    return made


def logits(model, image):
    with torch.no_grad():
        return model(image)


def chosen(swin_v2, model):
    return [(found.layer, found.bias, found.rank) for found in swin_v2.choices(model)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "rough"}, r"mode='rough'; wanted: 'exact' or 'auto' or 'factored'"),
        ({"rank": 0}, "rank=0; wanted: a whole number, 1 or more"),
        ({"rank": 2.5}, r"rank=2\.5"),
        ({"tolerance": -1.0}, r"tolerance=-1\.0"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
    ],
    ids=["mode", "rank", "fraction", "negative", "nan"],
)
def test_configuration_that_does_not_exist(swin_v2, options, message):
    before = swin_v2.INTEGRATION.settings
    with pytest.raises(ConfigurationError, match=message):
        swin_v2.configure(**options)
    assert swin_v2.INTEGRATION.settings is before
    assert before == Settings(mode="auto", rank=16, tolerance=1e-3)


def table(heads=2, n=36):
    """A matrix of a rank of about a dozen."""
    x = torch.linspace(-1, 1, n)
    width = torch.linspace(0.3, 0.5, heads)[:, None, None]
    return 8 * torch.exp(-(((x[:, None] - x) / width) ** 2))


def choose(mode, tolerance=1e-3, dtype=torch.float16, bias=None):
    bias = table() if bias is None else bias
    settings = Settings(mode, 5, tolerance)
    return choice.choose(bias.to, dtype, torch.full((len(bias),), 10.0), 16, settings)


def test_exact_and_factored_are_as_asked_for():
    bias, made = choose("exact")
    assert isinstance(bias, DenseBias)
    assert torch.equal(bias.values, table().half())
    assert made == Choice("", "exact", "asked for")
    bias, made = choose("factored")
    assert isinstance(bias, FactoredBias)
    assert bias.q_factor.dtype == torch.float16
    assert (made.bias, made.rank, made.reason) == ("factored", 5, "asked for")
    assert made.output_error > made.table_error > 0


def test_auto_takes_no_factors_that_do_not_pay(found, monkeypatch):
    monkeypatch.setattr(plan, "factors_pay", lambda *args: False)
    bias, made = choose("auto")
    assert torch.equal(bias.values, table().half())
    assert (made.bias, made.rank) == ("exact", None)
    assert "do not pay" in made.reason
    assert not found, "nothing is decomposed in vain"


def test_auto_takes_the_smallest_rank_within_the_tolerance(monkeypatch):
    monkeypatch.setattr(plan, "factors_pay", lambda n_q, n_k, head_dim, rank, *rest: rank <= 32)
    bias, made = choose("auto")
    assert (made.bias, made.rank) == ("factored", 16)
    assert made.output_error - made.table_error <= 1e-3
    rough = torch.randn(2, 36, 36)
    bias, made = choose("auto", bias=rough)
    assert torch.equal(bias.values, rough.half())
    assert (made.bias, made.rank) == ("exact", 32)
    assert made.output_error - made.table_error > 1e-3
    assert "not within 1e-03" in made.reason
    assert choose("auto", tolerance=1.0, bias=rough)[1].bias == "factored"


@pytest.mark.parametrize("mode", ["auto", "factored"])
def test_broken_weights_stay_what_they_are(mode, monkeypatch):
    monkeypatch.setattr(plan, "factors_pay", lambda *args: True)
    bias, made = choose(mode, bias=torch.full((2, 4, 4), torch.nan))
    assert bias.values.isnan().all()
    assert (made.bias, made.reason) == ("exact", "it has infinite or NaN entries")


def test_auto_asks_the_plan_for_its_own_problem(monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "factors_pay", lambda *args: asked.append(args))
    choose("auto")
    assert {(n_q, n_k, head_dim, kind, size) for n_q, n_k, head_dim, _, _, kind, size in asked} == {
        (36, 36, 16, "cpu", 2)
    }


@both_hosts
def test_choices_of_a_model(swin_v2, make_model, image):
    model = make_model()
    names = [f"layers.{stage}.blocks.{block}.attn" for stage in range(2) for block in range(2)]
    assert chosen(swin_v2, model) == [(name, "undecided", None) for name in names]
    logits(model, image)
    assert chosen(swin_v2, model) == [(name, "exact", None) for name in names]
    swin_v2.configure(mode="factored", rank=7)
    logits(model, image)
    assert chosen(swin_v2, model) == [(name, "factored", 7) for name in names]
    assert all(0 < made.output_error < 1 for made in swin_v2.choices(model))
    logits(model.train(), image)
    assert chosen(swin_v2, model) == [(name, "exact", None) for name in names]
    assert all("in training" in made.reason for made in swin_v2.choices(model))


@both_hosts
@pytest.mark.parametrize("shifted", [False, True], ids=["whole", "shifted"])
def test_factored_attention_is_attention_with_the_factors(host, swin_v2, small_model, found, shifted):
    swin_v2.configure(mode="factored", rank=6)
    model = small_model()
    attention = model.layers[0].blocks[shifted].attn
    mask = model.layers[0].blocks[shifted].attn_mask
    x = torch.randn(32, 16, 16, device=DEVICE)
    with torch.no_grad():
        ours = attention(x, mask)
    (made,) = found
    assert made.rank == 6

    def expected(dtype):
        query, key, value = (
            part.to(dtype) for part in swin_v2._project(attention, x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        )
        scale = attention.logit_scale.to(dtype).exp()
        query, key = torch.nn.functional.normalize(query, dim=-1) * scale, torch.nn.functional.normalize(key, dim=-1)
        scores = query @ key.mT + made.bias().dense(16, 16, dtype=dtype)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None].to(dtype)).flatten(0, 1)
        out = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return torch.nn.functional.linear(out, attention.proj.weight.to(dtype), attention.proj.bias.to(dtype))

    with torch.no_grad():
        assert_as_accurate("out", ours, expected(torch.float32), expected(torch.float64), torch.float32)


@both_hosts
def test_enough_factors_give_the_logits_of_the_host(swin_v2, stock, make_model, image):
    model = make_model()
    with stock():
        expected = logits(model, image)
    swin_v2.configure(mode="factored", rank=2)
    assert not torch.allclose(logits(model, image), expected, atol=1e-3)
    swin_v2.configure(mode="factored", rank=16)
    torch.testing.assert_close(logits(model, image), expected, rtol=1e-4, atol=1e-4)


def test_factors_within_a_tolerance_change_the_output_by_no_more(swin_v2, small_model, image, monkeypatch):
    monkeypatch.setattr(plan, "factors_pay", lambda *args: True)
    model = small_model(window_size=8, img_size=64)
    image = torch.randn(2, 1, 64, 64, device=DEVICE)
    swin_v2.configure(mode="exact")
    exact = logits(model, image)
    for tolerance in (0.3, 1e-3):
        swin_v2.configure(tolerance=tolerance)
        ours = logits(model, image)
        made = swin_v2.choices(model)
        assert all(m.bias == "factored" and m.output_error - m.table_error <= tolerance for m in made)
        assert 0 < (ours - exact).norm() / exact.norm() < tolerance


def test_factors_are_made_once_until_the_weights_change(swin_v2, small_model, image, found):
    swin_v2.configure(mode="factored", rank=6)
    model, other = small_model(), small_model()

    def assert_made(count):
        found.clear()
        ours = logits(model, image)
        assert len(found) == count
        assert torch.equal(logits(model, image), ours)
        assert len(found) == count
        return ours

    first = assert_made(2)
    model.load_state_dict(other.state_dict())
    assert not torch.allclose(assert_made(2), first, atol=1e-2)
    assert torch.equal(logits(model, image), logits(other, image))
    with torch.no_grad():
        model.layers[0].blocks[0].attn.cpb_mlp[2].weight.mul_(2)
    assert_made(1)
    swin_v2.configure(mode="factored", rank=7)
    assert_made(2)
    model.to(torch.float64).to(torch.float32)
    assert_made(2)
    model.train().eval()
    assert_made(2)
    if hasattr(model, "set_input_size"):
        model.set_input_size((64, 64), window_size=8)
        image = torch.randn(1, 1, 64, 64, device=DEVICE)
        assert_made(2)


def test_gradients_reach_the_bias_in_every_mode(swin_v2, stock, small_model, image, found, caplog):
    model = small_model().train()

    def gradients():
        model.zero_grad()
        model(image).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    with stock():
        expected = gradients()
    swin_v2.configure(mode="factored", rank=2)
    for _ in range(2):
        for name, gradient in gradients().items():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * scale, msg=name)
    assert all(expected[name].abs().max() > 0 for name in expected if "cpb_mlp" in name or "logit_scale" in name)
    assert not found
    assert sum("the exact bias is made in every call" in record.message for record in caplog.records) == 1


def test_weights_that_are_made_in_every_call_are_not_decomposed(swin_v2, small_model, image, found):
    """As by `torch.func.functional_call`, or in the replicas of `DataParallel`."""
    swin_v2.configure(mode="factored", rank=2)
    model = small_model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        result = torch.func.functional_call(model, weights, (image,))
    assert not found
    swin_v2.configure(mode="exact")
    torch.testing.assert_close(result, logits(model, image))


def test_small_network_of_another_make_or_with_hooks_is_computed_by_itself(swin_v2, stock, small_model, image, found):
    swin_v2.configure(mode="factored", rank=2)
    model = small_model()
    first, second = (block.attn.cpb_mlp for block in model.layers[0].blocks)
    first.insert(1, torch.nn.Tanh())
    second[2].register_forward_hook(lambda module, args, out: out / 2)
    ours = logits(model, image)
    with stock():
        torch.testing.assert_close(ours, logits(model, image), rtol=1e-4, atol=1e-4)
    assert not found
    assert all(made.reason.startswith("a cpb_mlp of another make") for made in swin_v2.choices(model))


@both_hosts
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_factors_follow_the_weights(swin_v2, small_model, image, found, backend):
    swin_v2.configure(mode="factored", rank=6)
    model, other = small_model(), small_model()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    first = logits(compiled, image)
    assert len(found) == 2
    torch.testing.assert_close(logits(compiled, image), first)
    torch.testing.assert_close(logits(model, image), first)
    assert len(found) == 2, "made once, for eager mode too"
    model.load_state_dict(other.state_dict())
    expected = logits(other, image)
    assert not torch.allclose(first, expected, atol=1e-2)
    torch.testing.assert_close(logits(compiled, image), expected)
    with torch.no_grad():
        for a, b in zip(model.parameters(), small_model().parameters(), strict=True):
            a.lerp_(b, 0.5)  # as an average of weights does, without a word to the module
    ours = logits(compiled, image)
    assert not torch.allclose(ours, expected, atol=1e-2)
    torch.testing.assert_close(ours, logits(model, image))


def test_compiled_choice_follows_the_configuration(swin_v2, small_model, image):
    model = small_model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    results = []
    for options in ({"mode": "exact"}, {"mode": "factored", "rank": 1}):
        swin_v2.configure(**options)
        results.append(logits(compiled, image))
        torch.testing.assert_close(results[-1], logits(model, image))
    assert not torch.allclose(*results, atol=1e-3)


def test_blocks_compiled_one_by_one_have_their_own_bias(swin_v2, small_model, image, found):
    swin_v2.configure(mode="factored", rank=6)
    model = small_model()
    expected = logits(model, image)
    for block in model.layers[0].blocks:
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(model, image), expected)
    assert len(found) == 2


@pytest.mark.parametrize("abreast", [False, True], ids=["contiguous", "abreast"])
@pytest.mark.parametrize("shifted", [False, True], ids=["whole", "shifted"])
def test_operator_of_compiled_graphs(swin_v2, small_model, shifted, abreast):
    block = small_model().layers[0].blocks[shifted]
    query, key, value = torch.randn(3, 32, 2, 16, 8, device=DEVICE)
    if abreast:  # heads of a row side by side, as a projection leaves them
        query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value))
    arguments = (query, key, value, block.attn_mask, [t.detach() for t in swin_v2._made_from(block.attn)])
    torch.library.opcheck(torch.ops.flashbias.swin_v2_attention.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["auto", "factored"])
def test_compiled_into_cuda_graphs(swin_v2, small_model, image, mode):
    """The graphs make the exact bias in every replay, and keep nothing in their memory."""
    swin_v2.configure(mode=mode, rank=6)
    model, other = small_model(), small_model()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for weights in (model, other):
        model.load_state_dict(weights.state_dict())
        swin_v2.INTEGRATION.settings = Settings("exact")
        expected = logits(model, image)
        swin_v2.INTEGRATION.settings = Settings(mode, 6)
        for _ in range(4):
            torch.testing.assert_close(logits(compiled, image).clone(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_choice_in_half_precision_on_a_gpu(swin_v2, small_model, found):
    model = small_model(img_size=64, window_size=16).half()
    image = torch.randn(2, 1, 64, 64, device=DEVICE).half()
    logits(model, image)
    assert len(found) == 2
    for made in swin_v2.choices(model):
        assert made.rank is not None
        assert (made.output_error - made.table_error <= 1e-3) == (made.bias == "factored")
