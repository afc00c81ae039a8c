import warnings

import pytest
import torch
from tiny_models import tiny_llava, tiny_qwen2_vl
from torch import nn

from gracekit.quant import LSQConfig, convert, coverage, prepare_qat

SMALL = LSQConfig(group_size=32)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight_of_experts = nn.Parameter(torch.zeros(4, 32, 64))
        self.router = nn.Linear(32, 32)


class Mixture(nn.Module):
    """A decoder whose blocks keep their experts in a three-dimensional parameter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 32)
        self.layers = nn.ModuleList([Experts(), Experts()])

    def get_decoder(self):
        return self


def test_a_mixture_of_experts_is_warned_of_with_its_reason():
    model = Mixture()
    with pytest.warns(
        UserWarning, match=r"only 11.1% .* left out: 4, the largest .*weight_of_experts.* three dimensions \(experts"
    ):
        prepare_qat(model, SMALL)
    report = coverage(model)
    assert report.experts == ("layers.0.weight_of_experts", "layers.1.weight_of_experts")
    matrices = 2 * 32 * 32
    assert report.share == pytest.approx(matrices / (matrices + 2 * 32 + 2 * 4 * 32 * 64))


def test_a_convolution_is_no_stack_of_experts_and_an_adapter_counts_on_neither_side():
    model = tiny_llava(layers=1)
    prepare_qat(model, SMALL)
    plain = coverage(model)
    attention = model.get_decoder().layers[0].self_attn
    attention.lora_A = nn.Linear(32, 64)
    assert coverage(model) == plain
    attention.short = nn.Conv1d(2, 2, 3)
    assert coverage(model).experts == ()
    assert len(coverage(model).left_out) == len(plain.left_out) + 2


def test_a_chosen_selection_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_qat(Mixture(), SMALL, filter_fn=lambda module, name: True)


@pytest.mark.parametrize("make", [tiny_llava, tiny_qwen2_vl])
def test_dense_decoders_are_covered_and_stay_so_when_converted(make):
    model = make()
    assert coverage(model).share == 0
    names = prepare_qat(model, SMALL)
    report = coverage(model)
    assert list(report.quantized) == [f"{name}.weight" for name in names]
    assert report.share > 0.95
    assert report.left_out
    assert all(name.endswith(("layernorm.weight", "bias")) for name in report.left_out)
    assert coverage(convert(model, "portable")) == report


def test_a_model_without_parameters_has_no_coverage():
    with pytest.raises(ValueError, match="parameters in its blocks, got none in ReLU"):
        coverage(nn.ReLU())
