"""The CUDA kernel's form. Needs a GPU; on the CPU these are skipped."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from quant_cases import kinds, weights
from strategies import normal, seeds
from torch import nn

from gracekit.quant import LSQConfig, convert, lsq_fake_quantize, prepare_qat
from gracekit.quant.int4 import read_weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def prepared_on_cuda(kind, seed, *, outputs=40, inputs=384, group_size=64):
    """Odd enough sizes that both paddings of the kernel's form are at work."""
    model = nn.Sequential(nn.Linear(inputs, outputs, dtype=torch.bfloat16, device="cuda"))
    with torch.no_grad():
        model[0].weight.copy_(weights(kind, seed, outputs, inputs, torch.bfloat16, group_size))
    prepare_qat(model, LSQConfig(group_size=group_size))
    return model


@settings(max_examples=20)
@given(seeds, kinds)
def test_codes_and_scales_survive_the_cuda_form(seed, kind):
    model = prepared_on_cuda(kind, seed)
    before = read_weight(model[0])
    after = read_weight(convert(model, "cuda")[0])
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.scale, before.scale)


@settings(max_examples=20)
@given(seeds)
def test_the_cuda_kernel_multiplies_by_exactly_the_trained_values(seed):
    model = prepared_on_cuda("normal", seed)
    with torch.no_grad():
        values = model[0].weight_fake_quantizer(model[0].weight)
    weight = convert(model, "auto")[0].weight
    assert type(weight).__name__ == "Int4TilePackedTo4dTensor"
    assert torch.equal(F.linear(torch.eye(384, dtype=torch.bfloat16, device="cuda"), weight), values.t())


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_cuda_kernel_stays_within_the_stated_bound(rows):
    model = prepared_on_cuda("outliers", 1)
    x = normal(2, rows, 384, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        values = model[0].weight_fake_quantizer(model[0].weight)
        trained = F.linear(x, values)
        product = F.linear(x, convert(model, "cuda")[0].weight)
    sizes = x.double().abs() @ values.double().abs().t()
    bound = torch.finfo(torch.bfloat16).eps * (trained.double().abs() + sizes)
    assert bool(((product.double() - trained.double()).abs() <= bound).all())


def test_a_float16_layer_is_refused_by_the_cuda_kernel_and_a_cpu_target_by_a_cuda_layer():
    model = nn.Sequential(nn.Linear(128, 16, dtype=torch.float16, device="cuda"))
    prepare_qat(model, LSQConfig(group_size=64))
    with pytest.raises(
        ValueError, match=r"needs bfloat16 activations \(pass dtype=torch.bfloat16\), got torch.float16 \(0\)"
    ):
        convert(model, "cuda")
    with pytest.raises(ValueError, match=r"target='cpu' needs the layer on a cpu device, got cuda:0 \(0\)"):
        convert(model, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_on_cuda_are_those_of_the_cpu(dtype):
    weight = normal(0, 16, 256, dtype=dtype)
    log_scale = normal(1, 16, 4, dtype=torch.float32, scale=0.2) - 1
    grad = normal(2, 16, 256, dtype=dtype)
    results = []
    for device in ("cpu", "cuda"):
        w, theta = (tensor.detach().clone().to(device).requires_grad_() for tensor in (weight, log_scale))
        values = lsq_fake_quantize(w, theta, group_size=64)
        values.backward(grad.to(device))
        results.append((values.cpu(), w.grad.cpu(), theta.grad.cpu()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-5)


def test_a_compiled_layer_computes_the_same_bits_on_cuda():
    model = prepared_on_cuda("ties", 0)
    fake = model[0].weight_fake_quantizer
    assert torch.equal(torch.compile(fake, fullgraph=True)(model[0].weight), fake(model[0].weight))
