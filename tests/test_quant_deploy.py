import copy

import pytest
import torch
from quant_cases import prepared, weights
from strategies import normal
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, quantize_
from torchao.quantization.quant_primitives import quantize_affine

from gracekit.quant import LSQConfig, convert, prepare_qat, quantize_rtn
from gracekit.quant.int4 import read_weight

SMALL = LSQConfig(group_size=32)


def two_layers(*, dtype=torch.float32, second=(32, 16), config=SMALL):
    model = nn.Sequential(nn.Linear(64, second[0], dtype=dtype), nn.ReLU(), nn.Linear(*second, dtype=dtype))
    prepare_qat(model, config)
    return model


@pytest.mark.parametrize(("bits", "form"), [(4, "Int4OpaqueTensor"), (3, "IntxUnpackedToInt8Tensor")])
def test_auto_takes_the_kernel_of_the_device_or_the_reference(bits, form):
    model = two_layers(config=LSQConfig(bits=bits, group_size=32))
    assert convert(model) is model
    assert [type(model[index].weight).__name__ for index in (0, 2)] == [form] * 2
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("target", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_converted_model_computes_what_it_computed_in_training(target, dtype):
    model = two_layers(dtype=dtype)
    x = normal(0, 2, 3, 64, dtype=dtype)
    trained = model(x)
    # Two layers of sums in another order, each rounded to dtype; outputs are of order 1.
    torch.testing.assert_close(convert(model, target)(x), trained, rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert not model[0].weight.requires_grad


def test_float32_weights_are_deployed_in_bfloat16_with_the_codes_they_were_trained_with():
    model = two_layers()
    before = read_weight(model[0])
    convert(model, "cpu", dtype=torch.bfloat16).to(torch.bfloat16)
    after = read_weight(model[0])
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.scale, before.scale)
    assert model(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("target", ["cpu", "reference", "portable"])
def test_a_converted_model_can_be_copied(target):
    model = convert(two_layers(), target)
    twin = copy.deepcopy(model)
    assert torch.equal(read_weight(twin[0]).codes, read_weight(model[0]).codes)


def test_round_to_nearest_is_the_plain_absmax_grid():
    model = nn.Sequential(nn.Linear(64, 16))
    weight = model[0].weight.detach().clone()
    quantize_rtn(model, LSQConfig(group_size=32, scale_dtype=torch.float32), target="reference")
    scale = weight.view(16, 2, 32).abs().amax(-1) / 7
    assert torch.equal(model[0].weight.scale, scale)
    assert torch.equal(
        model[0].weight.qdata.view(16, 2, 32), (weight.view(16, 2, 32) / scale[..., None]).round().to(torch.int8)
    )


def test_round_to_nearest_equals_torchaos_quantiser_at_these_scales():
    model = nn.Sequential(nn.Linear(64, 16))
    weight = model[0].weight.detach().clone()
    quantize_rtn(model, LSQConfig(bits=8, group_size=32, scale_dtype=torch.float32), target="reference")
    ours = model[0].weight
    theirs = quantize_affine(weight, (1, 32), ours.scale, ours.zero_point, torch.int8, -128, 127)
    # torchao multiplies by 1/s, which rounds the rare tie to the other side.
    assert bool(((theirs - ours.qdata).abs() <= 1).all())
    assert (theirs != ours.qdata).float().mean() < 0.01


def test_a_group_of_zeros_rounds_to_codes_of_zero_with_scale_one():
    model = nn.Sequential(nn.Linear(64, 16))
    nn.init.zeros_(model[0].weight)
    quantize_rtn(model, SMALL, target="reference")
    assert bool((model[0].weight.scale == 1).all())
    assert bool((model[0].weight.qdata == 0).all())


@pytest.mark.parametrize(
    ("target", "make", "match"),
    [
        (
            "cpu",
            lambda: two_layers(second=(32, 24)),
            r"target='cpu' needs out_features that 16 divides, got out_features=24 \(2\)",
        ),
        ("cpu", lambda: two_layers(config=LSQConfig(group_size=16)), r"group_size in .* got group_size=16 \(0\)"),
        ("cpu", lambda: two_layers(config=LSQConfig(bits=3, group_size=32)), r"needs bits=4, got bits=3 \(0\)"),
        (
            "portable",
            lambda: two_layers(config=LSQConfig(bits=7, group_size=32)),
            r"bits=4 or bits=8, got bits=7 \(0\)",
        ),
        (
            "portable",
            lambda: two_layers(config=LSQConfig(bits=4, group_size=1), second=(33, 16)),
            r"even in_features.*=33 \(2\)",
        ),
        ("cuda", two_layers, r"target='cuda' needs the layer on a cuda device, got cpu \(0\)"),
        ("reference", lambda: two_layers(dtype=torch.float64), r"float32 activations, got torch.float64 \(0\)"),
        (
            "cpu",
            lambda: two_layers(dtype=torch.bfloat16, config=LSQConfig(group_size=32, scale_dtype=torch.float32)),
            "holds exactly",
        ),
        (
            "cpu",
            lambda: nn.Sequential(nn.Linear(32, 32)),
            "model must have a quantised layer .* got none in Sequential",
        ),
        (
            "tpu",
            two_layers,
            "target must be one of 'auto', 'cpu', 'cuda', 'triton', 'portable', 'reference', got target='tpu'",
        ),
    ],
)
def test_a_layer_the_target_cannot_hold_is_named_and_nothing_has_changed(target, make, match):
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=match):
        convert(model, target)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_scale_that_float16_cannot_hold_is_refused():
    model = prepared(weights("tiny", 0, 16, 64, torch.bfloat16, 32))
    with pytest.raises(ValueError, match=r"scales that torch.float16 holds exactly, got torch.bfloat16 ones \(layer\)"):
        convert(model, "cpu", dtype=torch.float16)


@pytest.mark.parametrize("parameter", ["weight", "log_scale"])
def test_values_that_are_not_finite_are_refused(parameter):
    model = two_layers()
    layer = model[2]
    nn.init.constant_(layer.weight if parameter == "weight" else layer.weight_fake_quantizer.log_scale, float("nan"))
    with pytest.raises(ValueError, match=r"finite, got NaN or infinity \(2\)"):
        convert(model, "reference")


def test_a_weight_without_values_is_refused():
    model = two_layers()
    model[2].weight = nn.Parameter(model[2].weight.to("meta"))
    with pytest.raises(ValueError, match=r"whole and have values, got one on the meta device \(2\)"):
        convert(model, "reference")


def test_a_cast_log_scale_is_refused():
    with pytest.raises(ValueError, match=r"log_scale must be float32, as it was trained, got torch.bfloat16 \(0\)"):
        convert(two_layers().to(torch.bfloat16), "cpu")


def test_weights_that_torchao_quantised_otherwise_are_refused():
    model = nn.Sequential(nn.Linear(64, 32))
    quantize_(model, Float8WeightOnlyConfig())
    with pytest.raises(
        ValueError, match=r"must have been made by prepare_qat or convert, got Linear with Float8Tensor \(0\)"
    ):
        convert(model, "reference")


def test_zero_points_are_refused():
    model = convert(two_layers(), "reference")
    model[0].weight.zero_point.fill_(1)
    with pytest.raises(ValueError, match=r"symmetric codes and scales alone, got zero points in .* \(0\)"):
        convert(model, "cpu")


def test_eight_bits_are_portable_as_torchaos_int8_tensor_and_compute_what_was_trained():
    model = two_layers(dtype=torch.bfloat16, config=LSQConfig(bits=8, group_size=32))
    x = normal(0, 3, 64, dtype=torch.bfloat16)
    trained = model(x)
    convert(model, "portable")
    assert type(model[0].weight).__name__ == "Int8Tensor"
    torch.testing.assert_close(model(x), trained, rtol=0, atol=2 * torch.finfo(torch.bfloat16).eps)
    torch.testing.assert_close(convert(model, "reference")(x), trained, rtol=0, atol=0)


def test_quantised_activations_are_refused():
    model = nn.Sequential(nn.Linear(64, 32))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match=r"got quantised activations in Linear with Int8Tensor \(0\)"):
        convert(model, "reference")


def test_a_dtype_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="dtype must be one of"):
        convert(two_layers(), "cpu", dtype=torch.float64)
