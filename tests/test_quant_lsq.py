import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_cases import dtypes, kinds, weights
from strategies import normal, seeds
from torch import nn

from gracekit.quant import LSQConfig, _torch_lsq, lsq_fake_quantize, prepare_qat
from gracekit.quant.scheme import search_scale


def pair(dtype=torch.float32, outputs=4, groups=2, group_size=8):
    weight = normal(0, outputs, groups * group_size, dtype=dtype).requires_grad_()
    log_scale = (normal(1, outputs, groups, dtype=torch.float32, scale=0.2) - 1.5).requires_grad_()
    return weight, log_scale


def test_clipped_weights_pass_gradcheck_where_the_function_is_smooth():
    # Far outside the range W_q = -8 s or 7 s: no rounding is involved, and the estimator is the true derivative.
    weight = (normal(0, 3, 8).sign() * 50).requires_grad_()
    log_scale = normal(1, 3, 2, scale=0.1).requires_grad_()

    def clipped(weight, log_scale):
        return lsq_fake_quantize(weight, log_scale, group_size=4, scale_dtype=torch.float64)

    assert torch.autograd.gradcheck(clipped, (weight, log_scale))


def test_only_weight_and_scales_are_kept_for_backward():
    weight, log_scale = pair(torch.bfloat16)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lsq_fake_quantize(weight, log_scale, group_size=8)
    assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr(), log_scale.data_ptr()]


@pytest.mark.parametrize("frozen", ["weight", "log_scale"])
def test_a_frozen_side_gets_no_gradient_and_leaves_the_others_as_it_is(frozen):
    weight, log_scale = pair()
    lsq_fake_quantize(weight, log_scale, group_size=8).square().sum().backward()
    expected = log_scale.grad if frozen == "weight" else weight.grad
    weight.grad = log_scale.grad = None
    (weight if frozen == "weight" else log_scale).requires_grad_(False)
    lsq_fake_quantize(weight, log_scale, group_size=8).square().sum().backward()
    assert torch.equal(log_scale.grad if frozen == "weight" else weight.grad, expected)
    assert (weight if frozen == "weight" else log_scale).grad is None


def test_a_second_derivative_is_refused():
    weight, log_scale = pair()
    (grad,) = torch.autograd.grad(
        lsq_fake_quantize(weight, log_scale, group_size=8).square().sum(), weight, create_graph=True
    )
    with pytest.raises(
        RuntimeError, match="lsq_fake_quantize has a closed-form gradient and cannot be differentiated twice"
    ):
        grad.sum().backward()


@pytest.mark.parametrize("frozen", ["weight", "log_scale"])
def test_it_is_refused_beside_a_frozen_half_and_under_a_linear_loss_too(frozen):
    parts = dict(zip(("weight", "log_scale"), pair(), strict=True))
    parts[frozen].requires_grad_(False)
    (learned,) = (part for name, part in parts.items() if name != frozen)
    (grad,) = torch.autograd.grad(lsq_fake_quantize(**parts, group_size=8).sum(), learned, create_graph=True)
    with pytest.raises(RuntimeError, match="lsq_fake_quantize has a closed-form gradient"):
        grad.square().sum().backward()


@given(seeds, kinds, dtypes, st.integers(2, 8), st.integers(1, 9), st.integers(1, 40), st.sampled_from([0.0, 1.0]))
def test_gradients_in_place_are_those_out_of_place(seed, kind, dtype, bits, outputs, group_size, finer):
    weight = weights(kind, seed, outputs, 2 * group_size, dtype, group_size)
    log_scale = search_scale(weight, bits, group_size).clamp_min(2.0**-120).log() - finer
    weight.view(-1)[::11] = torch.nan
    grad = normal(seed + 2, *weight.shape, dtype=dtype)
    for start, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0)):
        grad.view(-1)[start::17] = value
    own = grad.clone()
    options = {"needs_weight": True, "needs_scale": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_torch_lsq, "_BLOCK", 3 * weight.shape[1])  # so that there are several, the last one smaller
        expected = _torch_lsq.backward(grad, weight, log_scale, bits, torch.bfloat16, **options)
        found = _torch_lsq.backward(own, weight, log_scale, bits, torch.bfloat16, **options, in_place=True)
    assert found[0] is own
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_computes_the_same_bits(backend, dtype):
    model = nn.Sequential(nn.Linear(64, 8, dtype=dtype))
    prepare_qat(model, LSQConfig(group_size=32))
    x = normal(2, 5, 64, dtype=dtype)
    fake = model[0].weight_fake_quantizer
    values = fake(model[0].weight)
    model(x).square().sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    assert torch.equal(torch.compile(fake, fullgraph=True, backend=backend)(model[0].weight), values)
    torch.compile(model, fullgraph=True, backend=backend)(x).square().sum().backward()
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_autocast_leaves_the_fake_quantised_weight_as_it_is():
    weight, log_scale = pair()
    with torch.autocast("cpu", torch.bfloat16):
        inside = lsq_fake_quantize(weight, log_scale, group_size=8)
    assert torch.equal(inside, lsq_fake_quantize(weight, log_scale, group_size=8))


def test_meta_tensors_pass_through_forward_and_backward():
    weight, log_scale = pair(torch.bfloat16)
    weight, log_scale = (tensor.detach().to("meta").requires_grad_() for tensor in (weight, log_scale))
    result = lsq_fake_quantize(weight, log_scale, group_size=8)
    assert (result.shape, result.dtype, result.device.type) == (weight.shape, torch.bfloat16, "meta")
    result.sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert log_scale.grad.shape == log_scale.shape


def test_operators_pass_torchs_own_checks():
    weight, log_scale = pair()
    torch.library.opcheck(torch.ops.gracekit.lsq_forward.default, (weight, log_scale, 4, torch.bfloat16))


def test_weights_of_any_strides_give_the_same_values():
    weight, log_scale = pair()
    strided = weight.detach().t().contiguous().t()
    assert torch.equal(
        lsq_fake_quantize(strided, log_scale, group_size=8), lsq_fake_quantize(weight, log_scale, group_size=8)
    )


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("extreme", [-1000.0, 1000.0])
def test_scales_beyond_their_dtype_are_held_at_its_ends(scale_dtype, extreme):
    weight = torch.tensor([[1.0, -1.0]], requires_grad=True)
    log_scale = torch.full((1, 1), extreme, requires_grad=True)
    result = lsq_fake_quantize(weight, log_scale, group_size=2, scale_dtype=scale_dtype)
    result.sum().backward()
    assert bool(result.isfinite().all())
    assert bool(log_scale.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_log_scale_that_is_not_float32_is_refused(dtype):
    weight, log_scale = pair()
    with pytest.raises(TypeError, match="log_scale must be float32"):
        lsq_fake_quantize(weight, log_scale.to(dtype), group_size=8)


def test_a_prepared_model_cast_as_a_whole_is_refused_in_the_forward():
    model = nn.Sequential(nn.Linear(32, 4))
    prepare_qat(model, LSQConfig(group_size=16))
    with pytest.raises(TypeError, match="log_scale must be float32"):
        model.to(torch.bfloat16)(torch.ones(1, 32, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": torch.ones(4, 16, dtype=torch.int8)}, TypeError, "weight must have a floating dtype"),
        ({"weight": torch.ones(16)}, ValueError, r"weight must have shape \(out, in\), got \(16,\)"),
        ({"group_size": 5}, ValueError, "group_size must divide in_features, got group_size=5 and in_features=16"),
        ({"group_size": 0}, ValueError, "group_size must be at least 1"),
        ({"group_size": 4}, ValueError, r"log_scale must have shape .* \(4, 4\), got \(4, 2\)"),
        ({"bits": 9}, ValueError, "bits must be at least 2 and at most 8, got bits=9"),
        ({"bits": 4.0}, TypeError, "bits must be an integer"),
        ({"scale_dtype": torch.float64}, ValueError, "scale_dtype must be one of"),
        ({"log_scale": torch.zeros(4, 2, device="meta")}, ValueError, "must be on one device"),
    ],
)
def test_bad_input_is_named(change, error, match):
    weight, log_scale = pair()
    arguments = {"weight": weight, "log_scale": log_scale, "group_size": 8} | change
    with pytest.raises(error, match=match):
        lsq_fake_quantize(arguments.pop("weight"), arguments.pop("log_scale"), **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"bits": 1}, ValueError, "bits must be at least 2 and at most 8, got bits=1"),
        ({"bits": True}, TypeError, "bits must be an integer"),
        ({"group_size": -1}, ValueError, "group_size must be at least 1, got group_size=-1"),
        ({"scale_dtype": torch.int8}, ValueError, "scale_dtype must be one of"),
        ({"scale_dtype": torch.float64}, ValueError, "scale_dtype must be one of"),
    ],
)
def test_a_configuration_checks_itself(arguments, error, match):
    with pytest.raises(error, match=match):
        LSQConfig(**arguments)
