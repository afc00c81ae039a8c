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


def composed(layer, x):
    """What a layer computes, in two steps."""
    fake = layer.weight_fake_quantizer
    values = lsq_fake_quantize(layer.weight, fake.log_scale, group_size=fake.config.group_size)
    return F.linear(x, values, layer.bias)


def layer_on_cuda(dtype, *, outputs, inputs, group_size, bias):
    """A layer of which a good part of the weights is clipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias, dtype=dtype, device="cuda"))
    prepare_qat(model, LSQConfig(group_size=group_size))
    with torch.no_grad():
        model[0].weight_fake_quantizer.log_scale.sub_(0.7)
    return model[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(384,), (33, 384), (2, 5, 384), (2, 0, 384), (2, 256, 384)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_layer_in_one_function_has_the_bits_of_the_two_steps(dtype, shape, bias):
    layer = layer_on_cuda(dtype, outputs=40, inputs=384, group_size=64, bias=bias)
    x = normal(1, *shape, dtype=dtype).cuda().requires_grad_()
    grad = normal(2, *shape[:-1], 40, dtype=dtype).cuda()
    found, expected = layer(x), composed(layer, x)
    leaves = [x, *layer.parameters()]
    assert torch.equal(found, expected)
    gradients = torch.autograd.grad(found, leaves, grad)
    for a, b in zip(gradients, torch.autograd.grad(expected, leaves, grad), strict=True):
        assert torch.equal(a, b)
    if x.numel():
        assert bool((gradients[1] == 0).any())


def allocated(function):
    """Return what ``function`` returns, and the bytes that it allocates in all, those that it frees again included."""
    before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
    result = function()
    return result, torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before


def test_a_layer_keeps_two_bytes_a_weight_more_than_a_plain_one_and_makes_one_tensor_less_than_two_steps():
    layer = layer_on_cuda(torch.bfloat16, outputs=1024, inputs=4096, group_size=128, bias=False)
    plain = nn.Linear(4096, 1024, bias=False, dtype=torch.bfloat16, device="cuda")
    x = normal(1, 64, 4096, dtype=torch.bfloat16).cuda().requires_grad_()
    grad = torch.ones(64, 1024, dtype=torch.bfloat16, device="cuda")
    size = 2 * layer.weight.numel()
    calls = {"plain": plain, "layer": layer, "two steps": lambda x: composed(layer, x)}
    leaves = {name: [x, *(plain if name == "plain" else layer).parameters()] for name in calls}
    kept, peak, made = {}, {}, {}
    for _ in range(2):  # compiled and warm the second time
        for name, call in calls.items():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            output = call(x)
            kept[name] = torch.cuda.memory_allocated() - before
            # Kept for a second backward pass, so that W_q does not make room for what comes after it.
            gradients, made[name] = allocated(
                lambda output=output, name=name: torch.autograd.grad(output, leaves[name], grad, retain_graph=True)
            )
            peak[name] = torch.cuda.max_memory_allocated() - before
            del output, gradients
    # Scales and their gradient are a sixty-fourth of the weight each.
    assert kept["layer"] - kept["plain"] <= 1.05 * size
    assert peak["layer"] - peak["plain"] <= 1.05 * size
    assert made["layer"] - made["plain"] <= 0.05 * size
    assert made["two steps"] - made["plain"] >= 0.95 * size
    assert peak["two steps"] - peak["layer"] >= 0.9 * size
