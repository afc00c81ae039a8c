"""A layer in training is one function of product and fake quantiser: the same bits as the two, and one buffer less."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gracekit.quant import LSQConfig, lsq_fake_quantize, prepare_qat

INPUTS = 48
shapes = st.lists(st.integers(0, 6), max_size=3).map(lambda leading: (*leading, INPUTS))
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


def prepared_layer(dtype=torch.float32, *, outputs=8, inputs=INPUTS, bias=True, seed=0):
    """A layer of which a good part of the weights is clipped."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias, dtype=dtype))
    prepare_qat(model, LSQConfig(group_size=16))
    with torch.no_grad():
        model[0].weight_fake_quantizer.log_scale.sub_(0.7)
    return model[0]


def composed(layer, x):
    """What the layer is to compute, in two steps."""
    values = lsq_fake_quantize(layer.weight, layer.weight_fake_quantizer.log_scale, group_size=16)
    return F.linear(x, values, layer.bias)


def is_one_function(output):
    """Whether the output was computed by the function of both, not by two."""
    before = [function for function, _ in output.grad_fn.next_functions if function is not None]
    return any(function.name() == "_QuantizedLinearBackward" for function in (output.grad_fn, *before))


def drawn(shape=(5, INPUTS), dtype=torch.float32, seed=1, **options):
    """A layer, its input, and a gradient of its output."""
    layer = prepared_layer(dtype, seed=seed, **options)
    x = normal(seed, *shape, dtype=dtype).requires_grad_()
    return layer, x, normal(seed + 1, *shape[:-1], layer.out_features, dtype=dtype)


def leaves(layer, x):
    return [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@given(seeds, dtypes, shapes, st.integers(1, 40), st.booleans())
def test_output_and_gradients_are_those_of_the_two_steps_bit_for_bit(seed, dtype, shape, outputs, bias):
    layer, x, grad = drawn(shape, dtype, seed, outputs=outputs, bias=bias)
    found, expected = layer(x), composed(layer, x)
    assert is_one_function(found)
    assert_equal([found], [expected])
    inputs = leaves(layer, x)
    assert len(inputs) == 3 + bias
    assert_equal(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad))


@pytest.mark.parametrize("trained", range(16))
def test_what_is_frozen_gets_no_gradient_and_leaves_the_others_as_they_are(trained):
    layer, x, grad = drawn()
    parts = [x, layer.weight, layer.weight_fake_quantizer.log_scale, layer.bias]
    for place, part in enumerate(parts):
        part.requires_grad_(bool(trained >> place & 1))
    found, expected = layer(x), composed(layer, x)
    assert torch.equal(found, expected)
    assert found.requires_grad == bool(trained)
    if trained:
        assert is_one_function(found)
        found.backward(grad)
        inputs = [part for part in parts if part.requires_grad]
        assert_equal([part.grad for part in inputs], torch.autograd.grad(expected, inputs, grad))
        assert all(part.grad is None for part in parts if not part.requires_grad)


@pytest.mark.parametrize(
    ("frozen", "kept"),
    [
        ([], ["x", "weight", "log_scale", "values"]),
        (["x"], ["x", "weight", "log_scale"]),
        (["weight"], ["x", "weight", "log_scale", "values"]),
        (["weight", "log_scale"], ["weight", "log_scale", "values"]),
        (["x", "weight", "log_scale", "bias"], []),
    ],
)
def test_only_what_the_backward_pass_reads_is_kept(frozen, kept):
    layer, x, _ = drawn()
    parts = {"x": x, "weight": layer.weight, "log_scale": layer.weight_fake_quantizer.log_scale, "bias": layer.bias}
    names = {part.data_ptr(): name for name, part in parts.items()}
    for name in frozen:
        parts[name].requires_grad_(False)
    found = []

    def keep(tensor):
        assert tensor.data_ptr() in names or tensor.shape == layer.weight.shape
        found.append(names.get(tensor.data_ptr(), "values"))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert found == kept


def address(tensor):
    return tensor.untyped_storage().data_ptr()


class Made(TorchDispatchMode):
    """Notes where every tensor of ``count`` elements lies that an operation makes, views of its arguments apart.

    The tensors themselves it lets go: autograd takes over as a leaf's gradient only what nobody else holds.
    """

    def __init__(self, count):
        super().__init__()
        self.count, self.addresses = count, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.count:
            given = {
                address(tensor) for tensor in (*args, *(kwargs or {}).values()) if isinstance(tensor, torch.Tensor)
            }
            if address(result) not in given:
                self.addresses.append(address(result))
        return result


def test_the_gradient_of_the_weight_is_the_product_itself_and_nothing_else_of_its_size_is_made():
    # Of more elements than a block that the fake quantiser works on at a time.
    layer, x, grad = drawn((3, 1024), outputs=1024, inputs=1024)
    found, expected = layer(x), composed(layer, x)
    with Made(layer.weight.numel()) as made:
        found.backward(grad)
    assert made.addresses == [address(layer.weight.grad)]
    layer.weight.grad = None
    with Made(layer.weight.numel()) as made:
        expected.backward(grad)
    assert len(made.addresses) == 2


def test_a_gradient_that_is_not_finite_does_not_pass_a_clipped_weight():
    layer, x, grad = drawn()
    grad[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    found = torch.autograd.grad(layer(x), leaves(layer, x), grad)
    assert_equal(found, torch.autograd.grad(composed(layer, x), leaves(layer, x), grad))
    clipped = torch.autograd.grad(layer.weight_fake_quantizer(layer.weight).sum(), layer.weight)[0] == 0
    rows = found[1][:3]
    assert bool(clipped[:3].any(dim=1).all())
    assert bool((rows[clipped[:3]] == 0).all())
    assert not bool(rows[~clipped[:3]].isfinite().any())


def test_the_backward_pass_can_be_repeated_and_gradients_accumulate():
    layer, x, grad = drawn()
    output = layer(x)
    once = torch.autograd.grad(output, leaves(layer, x), grad, retain_graph=True)
    assert_equal(torch.autograd.grad(output, leaves(layer, x), grad, retain_graph=True), once)
    for _ in range(2):
        output.backward(grad, retain_graph=True)
    assert_equal([leaf.grad for leaf in leaves(layer, x)], [2 * gradient for gradient in once])


@pytest.mark.parametrize("shape", [(INPUTS,), (5, INPUTS), (2, 3, INPUTS)])
def test_the_output_may_be_modified_in_place(shape):
    layer, x, grad = drawn(shape)
    found = torch.autograd.grad(layer(x).relu_(), leaves(layer, x), grad)
    assert_equal(found, torch.autograd.grad(composed(layer, x).relu_(), leaves(layer, x), grad))


@pytest.mark.parametrize("part", ["weight", "x"])
def test_what_was_modified_since_the_forward_pass_is_noticed(part):
    layer, x, grad = drawn()
    output = layer(x)
    with torch.no_grad():
        (x if part == "x" else layer.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(grad)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "saved on the CPU"])
@pytest.mark.parametrize("shape", [(5, INPUTS), (2, 3, INPUTS)])
def test_checkpointing_and_offloading_change_no_gradient(how, shape):
    layer, x, grad = drawn(shape)
    expected = torch.autograd.grad(layer(x), leaves(layer, x), grad)
    if how == "saved on the CPU":
        with torch.autograd.graph.save_on_cpu():
            output = layer(x)
    else:
        output = checkpoint(layer, x, use_reentrant=how == "reentrant")
    output.backward(grad)
    assert_equal([leaf.grad for leaf in leaves(layer, x)], expected)


@pytest.mark.parametrize("shape", [(INPUTS,), (5, INPUTS), (2, 3, INPUTS)])
def test_a_penalty_on_the_gradient_of_the_input_is_differentiated_as_that_of_the_two_steps(shape):
    layer, x, _ = drawn(shape, torch.float64)
    layer.double()  # the scales' gradients too, which are sums in another order

    def gradients(output):
        (slope,) = torch.autograd.grad(output.tanh().square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.pow(4).sum(), leaves(layer, x))

    output = layer(x)
    assert is_one_function(output)
    for a, b in zip(gradients(output), gradients(composed(layer, x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert bool(a.any())


@pytest.mark.parametrize("frozen", [None, "weight", "log_scale"])
def test_differentiating_the_fake_quantiser_twice_is_refused(frozen):
    layer, x, _ = drawn()
    parts = {"weight": layer.weight, "log_scale": layer.weight_fake_quantizer.log_scale}
    if frozen is not None:
        parts.pop(frozen).requires_grad_(False)
    for part in parts.values():
        (slope,) = torch.autograd.grad(layer(x).square().sum(), part, create_graph=True)
        with pytest.raises(RuntimeError, match="lsq_fake_quantize has a closed-form gradient"):
            slope.sum().backward()


@pytest.mark.parametrize("create_graph", [False, True])
def test_an_input_made_of_the_weight_has_its_gradient_counted_once(create_graph):
    layer = prepared_layer(torch.float64)
    calls = []
    layer.weight.register_hook(lambda gradient: calls.append(1))
    found = torch.autograd.grad(layer(layer.weight.tanh()).sum(), [*layer.parameters()], create_graph=create_graph)
    assert len(calls) == 1
    expected = torch.autograd.grad(composed(layer, layer.weight.tanh()).sum(), [*layer.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Marked(torch.Tensor):
    """A tensor of another kind."""


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, x: x.as_subclass(Marked),
        lambda layer, x: x.t().contiguous().t(),
        lambda layer, x: x[:, None].expand(-1, 2, -1),
    ],
)
def test_an_input_of_another_kind_or_layout_takes_the_two_steps(change):
    layer, x, _ = drawn()
    given = change(layer, x)
    output = layer(given)
    assert not is_one_function(output)
    assert_equal([output], [composed(layer, given)])


def test_autocast_takes_the_two_steps_and_casts_as_they_do():
    layer, x, grad = drawn()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = layer(x), composed(layer, x)
    assert found.dtype == torch.bfloat16
    assert not is_one_function(found)
    assert_equal([found], [expected])
    grad = grad.bfloat16()
    inputs = leaves(layer, x)
    assert_equal(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad))


def test_a_backward_pass_under_autocast_casts_as_that_of_the_two_steps():
    layer, x, grad = drawn()
    found, expected = layer(x), composed(layer, x)
    inputs = leaves(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad))


def test_forward_mode_derivatives_go_through_the_product():
    layer, x, _ = drawn()
    tangent = normal(7, *x.shape, dtype=x.dtype)
    with torch.autograd.forward_ad.dual_level():
        output = layer(torch.autograd.forward_ad.make_dual(x.detach(), tangent))
        found = torch.autograd.forward_ad.unpack_dual(output).tangent
    assert torch.equal(found, F.linear(tangent, layer.weight_fake_quantizer(layer.weight)))


def test_an_activation_fake_quantiser_comes_before_the_product():
    layer, x, _ = drawn()
    layer.activation_fake_quantizer = nn.Tanh()
    assert torch.equal(layer(x), composed(layer, x.tanh()))


def test_a_layer_of_meta_tensors_has_shapes_and_dtypes():
    layer, x, _ = drawn((2, 3, INPUTS), torch.bfloat16)
    layer, x = layer.to("meta"), x.detach().to("meta")
    output = layer(x)
    assert (output.shape, output.dtype, output.device.type) == ((2, 3, 8), torch.bfloat16, "meta")
    output.sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[..., :-1],
        lambda x: x[0, 0],
        lambda x: x[:, :0],
        lambda x: x.double(),
        lambda x: x.detach().to(torch.int64),
        lambda x: x.detach().numpy(),
        lambda x: None,
    ],
)
def test_an_input_that_does_not_fit_is_refused_as_by_any_linear_layer(change):
    layer, x, _ = drawn()
    given = change(x)
    with pytest.raises((RuntimeError, TypeError)) as expected:
        composed(layer, given)
    with pytest.raises(expected.type) as found:
        layer(given)
    assert str(found.value) == str(expected.value)


def test_a_bias_that_does_not_fit_is_refused_as_by_any_linear_layer():
    layer, x, _ = drawn()
    layer.bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(RuntimeError) as expected:
        composed(layer, x)
    with pytest.raises(RuntimeError) as found:
        layer(x)
    assert str(found.value) == str(expected.value)
