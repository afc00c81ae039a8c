"""The weights that were trained are the weights that run: bit for bit, whatever they are."""

import copy

import pytest
import reference_quant as reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_cases import dtypes, kinds, prepared, trained_values, weights
from strategies import normal, seeds
from torchao.quantization.quant_primitives import dequantize_affine

from gracekit.quant import convert
from gracekit.quant.int4 import read_weight

targets = st.sampled_from(["portable", "reference", "cpu"])


def case(kind, seed, dtype, *, shift, bits=4, scale_dtype=torch.bfloat16):
    weight = weights(kind, seed, 32, 64, dtype, 32)
    return prepared(weight, bits=bits, scale_dtype=scale_dtype, shift=seed if shift else None)


def holds_exactly(model, dtype):
    """Whether the scales of training are numbers of ``dtype``; where they are not, conversion must refuse."""
    fake = model["layer"].weight_fake_quantizer
    scale = fake.log_scale.detach().double().exp().to(fake.config.scale_dtype)
    return bool((scale.to(dtype).double() == scale.double()).all())


def refuses(model, dtype, target):
    """Whether the scales keep a layer from a kernel's form, which it must then say, naming the layer."""
    if holds_exactly(model, dtype):
        return False
    with pytest.raises(ValueError, match=rf"needs scales that {dtype} holds exactly.*\(layer\)"):
        convert(model, target)
    return True


@given(seeds, kinds, dtypes, st.booleans(), st.integers(2, 8))
def test_the_reference_form_dequantises_to_the_training_forward_bit_for_bit(seed, kind, dtype, shift, bits):
    model = case(kind, seed, dtype, shift=shift, bits=bits)
    values, _ = trained_values(model)
    weight = convert(model, "reference")["layer"].weight
    assert torch.equal(weight.dequantize(), values)
    # dequantize_affine is torchao's own formula; nothing of ours takes part in it.
    again = dequantize_affine(
        weight.qdata, (1, 32), weight.scale, weight.zero_point, torch.int8, -128, 127, output_dtype=dtype
    )
    assert torch.equal(again, values)


@given(seeds, kinds, dtypes, st.booleans(), targets)
def test_codes_and_scales_survive_every_form(seed, kind, dtype, shift, target):
    model = case(kind, seed, dtype, shift=shift)
    if target != "reference" and refuses(model, dtype, target):
        return
    before = read_weight(model["layer"])
    after = read_weight(convert(model, target)["layer"])
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.scale.double(), before.scale.double())
    assert after.dtype == dtype


@given(seeds, kinds, dtypes, st.booleans())
def test_eight_bit_codes_and_scales_survive_the_portable_form(seed, kind, dtype, shift):
    model = case(kind, seed, dtype, shift=shift, bits=8)
    values, scale = trained_values(model)
    layer = convert(model, "portable")["layer"]
    assert torch.equal(layer.weight.dequantize(), values)
    assert torch.equal(read_weight(layer).scale.double(), scale)


@settings(max_examples=15)
@given(seeds, kinds, st.sampled_from([torch.bfloat16, torch.float32]))
def test_codes_are_those_of_the_float64_oracle_except_at_float32_ties(seed, kind, dtype):
    model = case(kind, seed, dtype, shift=True)
    held = read_weight(model["layer"])
    expected = reference.codes(model["layer"].weight.detach(), held.scale, 4)
    ratio = model["layer"].weight.double() / held.scale.double().repeat_interleave(32, 1)
    tie = (ratio - ratio.floor() - 0.5).abs() < 1e-6 * ratio.abs().clamp_min(1)
    assert bool(((held.codes == expected) | tie).all())
    assert bool(((held.codes - expected).abs() <= 1).all())


@given(seeds, kinds, dtypes, st.booleans())
def test_the_cpu_kernel_multiplies_by_exactly_the_trained_values(seed, kind, dtype, shift):
    model = case(kind, seed, dtype, shift=shift)
    if refuses(model, dtype, "cpu"):
        return
    values, _ = trained_values(model)
    layer = convert(model, "cpu")["layer"]
    product = F.linear(torch.eye(64, dtype=dtype), layer.weight)
    assert torch.equal(product, values.t())


@settings(max_examples=25)
@given(
    seeds,
    st.sampled_from(["normal", "outliers", "zero groups"]),
    dtypes,
    st.sampled_from([1, 3, 17]),
    st.sampled_from([64, 4096]),
)
def test_the_cpu_kernel_stays_within_the_stated_bounds(seed, kind, dtype, rows, inputs):
    model = prepared(weights(kind, seed, 32, inputs, dtype, 32), shift=seed)
    if refuses(model, dtype, "cpu"):
        return
    values, scale = trained_values(model)
    codes = (values.double().unflatten(1, (-1, 32)) / scale[..., None]).round()
    exact = (codes * scale[..., None]).flatten(1)
    x = normal(seed + 5, rows, inputs, dtype=dtype)
    with torch.no_grad():
        trained = F.linear(x, values).double()
        product = F.linear(x, convert(model, "cpu")["layer"].weight).double()
    wanted, sizes, eps = x.double() @ exact.t(), x.double().abs() @ exact.abs().t(), torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).smallest_normal  # below it numbers are spaced evenly
    assert bool(((product - wanted).abs() <= eps / 2 * wanted.abs() + 2**-20 * sizes + tiny).all())
    assert bool(((product - trained).abs() <= eps * (wanted.abs() + sizes) + 2**-20 * sizes + tiny).all())


@settings(max_examples=15)
@given(seeds, dtypes, st.permutations(["portable", "reference", "cpu"]))
def test_any_chain_of_conversions_ends_where_one_would(seed, dtype, chain):
    model = case("normal", seed, dtype, shift=True)
    if refuses(model, dtype, "cpu"):
        return
    straight = read_weight(convert(copy.deepcopy(model), chain[-1])["layer"])
    for target in chain:
        convert(model, target)
    assert torch.equal(read_weight(model["layer"]).codes, straight.codes)
    assert torch.equal(read_weight(model["layer"]).scale, straight.scale)
