"""Fused projections hold the same codes, scales and weights, and the model gives the same answers."""

import copy

import pytest
import torch
from strategies import normal
from tiny_families import FAMILIES
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gracekit.inference import fuse_projections, generate
from gracekit.inference.fuse import SharedProduct
from gracekit.quant import LSQConfig, prepare_qat, quantize_rtn
from gracekit.quant.int4 import form_of, read_weight
from gracekit.quant.triton_tensor import Int4TritonTensor

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FORMS = {"reference": torch.float32, "portable": torch.bfloat16, "cpu": torch.bfloat16, "triton": torch.bfloat16}


def blocks_of(model):
    return model.get_decoder().layers


def plain_rows(block):
    """Rows of the projections of one block, one below the other: q, k, v; gate, up."""
    return [
        [getattr(block.self_attn, name) for name in QKV],
        [getattr(block.mlp, name) for name in GATE_UP],
    ]


def fused_rows(block):
    return [block.self_attn.q_proj.shared.linear, block.mlp.gate_proj.shared.linear]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl", "internvl"])
def test_a_fused_model_gives_the_same_logits_and_answers(name):
    """Qwen2-VL's projections have a bias; the others have none."""
    model = FAMILIES[name].build(seed=1)
    batch = FAMILIES[name].batch(["ttIt", "tItIt", "ttttttt"])
    with torch.no_grad():
        expected = model(**batch).logits
    answers = generate(model, batch, max_new_tokens=6).sequences
    fused = fuse_projections(model)
    assert len(fused) == 2 * len(blocks_of(model))
    assert all(type(block.self_attn.k_proj).__name__ == "ProjectionRows" for block in blocks_of(model))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(generate(model, batch, max_new_tokens=6).sequences, answers)


@pytest.mark.parametrize("form", FORMS)
def test_codes_and_scales_of_every_form_are_put_one_below_the_other(form):
    model = quantize_rtn(FAMILIES["qwen2_vl"].build(seed=1).to(FORMS[form]), LSQConfig(group_size=32), target=form)
    before = [plain_rows(block) for block in copy.deepcopy(blocks_of(model))]
    fuse_projections(model)
    for block, rows in zip(blocks_of(model), before, strict=True):
        for fused, parts in zip(fused_rows(block), rows, strict=True):
            assert form_of(fused) == form
            held, apart = read_weight(fused), [read_weight(part) for part in parts]
            assert torch.equal(held.codes, torch.cat([part.codes for part in apart]))
            assert torch.equal(held.scale, torch.cat([part.scale for part in apart]))
            assert held.dtype == FORMS[form]
            if parts[0].bias is None:
                assert fused.bias is None
            else:
                assert torch.equal(fused.bias, torch.cat([part.bias for part in parts]))


@pytest.mark.parametrize("form", ["reference", "cpu", "triton"])
def test_a_fused_quantised_block_computes_within_the_kernels_rounding(form):
    dtype = FORMS[form]
    model = quantize_rtn(FAMILIES["llava"].build(seed=1).to(dtype), LSQConfig(group_size=32), target=form)
    attention = blocks_of(model)[0].self_attn
    layers, x = [getattr(attention, name) for name in QKV], normal(0, 5, 32, dtype=dtype)
    apart = [layer(x) for layer in layers]
    fuse_projections(model)
    for name, layer, expected in zip(QKV, layers, apart, strict=True):
        weight = read_weight(layer).dequantize().double().abs()
        bound = 8 * torch.finfo(dtype).eps * (x.double().abs() @ weight.t())  # twice the bound of one product
        assert bool(((getattr(attention, name)(x).double() - expected.double()).abs() <= bound).all())


def test_fused_weights_have_the_workspace_of_the_others():
    model = quantize_rtn(FAMILIES["llava"].build(seed=1).bfloat16(), LSQConfig(group_size=32), target="triton")
    fuse_projections(model)
    weights = [
        layer.weight for layer in model.modules() if isinstance(getattr(layer, "weight", None), Int4TritonTensor)
    ]
    assert len({weight.workspace.number for weight in weights}) == 1 < len(weights)


def test_a_shared_product_is_computed_once_for_an_input_and_anew_for_the_next():
    linear = nn.Linear(4, 6, bias=False)
    calls = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    shared = SharedProduct(linear, [1, 2, 3])
    x, y = torch.ones(2, 4), torch.zeros(2, 4)
    whole = linear(x)
    calls.clear()
    assert torch.equal(torch.cat([shared.take(x, index) for index in (2, 0, 1)], dim=1), whole[:, [3, 4, 5, 0, 1, 2]])
    assert len(calls) == 1
    assert shared._input is None
    assert not shared.take(y, 0).any()
    assert torch.equal(shared.take(x, 0), whole[:, :1])  # what was left of y's is let go of
    assert len(calls) == 3


def llama():
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, **size)).eval()


def spoiled_by_a_hook(model):
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    return model


def spoiled_by_another_form(model):
    return quantize_rtn(
        model,
        LSQConfig(group_size=32),
        filter_fn=lambda _, name: name.endswith("1.self_attn.k_proj"),
        target="reference",
    )


def spoiled_by_another_group(model):
    for names, size in ((("q_proj", "k_proj"), 32), (("v_proj",), 16)):
        quantize_rtn(
            model,
            LSQConfig(group_size=size),
            filter_fn=lambda _, name, names=names: name.endswith(names),
            target="reference",
        )
    return model


def in_training(model):
    prepare_qat(model, LSQConfig(group_size=32))
    return model


REFUSED = {
    "a hook": (lambda: spoiled_by_a_hook(llama()), r"must carry no hooks.*layers.1.mlp.gate_proj\+up_proj"),
    "another form": (lambda: spoiled_by_another_form(llama()), r"must be alike in form.*layers.1.self_attn"),
    "another group": (lambda: spoiled_by_another_group(llama()), r"must have one group size.*layers.0.self_attn"),
    "layers in training": (lambda: in_training(llama()), "must have projections of one input in its decoder's blocks"),
    "no decoder": (lambda: nn.Sequential(nn.Linear(2, 2)), r"must have a decoder \(get_decoder\(\).layers\)"),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_fused_is_said_and_the_model_is_unchanged(make, said):
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=said):
        fuse_projections(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
