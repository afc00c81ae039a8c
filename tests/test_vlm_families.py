"""language_linears and its coverage: what of a model is quantised, and what is not."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_families import FAMILIES
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gracekit._structure import decoder_linears
from gracekit.vlm import coverage, language_linears

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("build", [tiny_models.tiny_llava, tiny_models.tiny_qwen2_vl])
def test_the_seven_projections_of_every_block_are_quantised_and_nothing_else(build):
    model = build(layers=2)
    linears = language_linears(model)
    expected = [f"model.language_model.layers.{i}" for i in range(2) for _ in PROJECTIONS]
    assert [name.rsplit(".", 2)[0] for name in linears] == expected
    assert [name.rsplit(".", 1)[1] for name in linears] == PROJECTIONS * 2
    assert all(model.get_submodule(name) is linear for name, linear in linears.items())


def test_a_text_model_is_a_language_model_too():
    config = LlamaConfig(vocab_size=32, **tiny_models.text_size(16, 1))
    assert len(language_linears(LlamaForCausalLM(config))) == 7


def test_a_model_without_a_decoder_has_every_linear_but_its_output_head_quantised():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.router, self.head, self.num_experts = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 8), 2
            self.lora_A = nn.Linear(4, 1)

        def get_output_embeddings(self):
            return self.head

    model = Plain()
    assert decoder_linears(model) == {"body": model.body, "router": model.router}


def test_names_are_those_of_the_model_that_was_asked_also_when_it_is_wrapped():
    class Wrapper(nn.Module):  # what DistributedDataParallel looks like from outside
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = tiny_models.tiny_llava(layers=1)
    inner, wrapped = language_linears(model), language_linears(Wrapper(model))
    assert list(wrapped) == [f"module.{name}" for name in inner]
    compiled = language_linears(torch.compile(model))
    assert list(compiled.values()) == list(inner.values())


def test_low_rank_adapters_are_left_out():
    model = tiny_models.tiny_llava(layers=1)
    attention = model.get_decoder().layers[0].self_attn
    attention.lora_A = nn.Linear(32, 2)
    model.get_decoder().layers[0].flora_fusion = nn.Linear(32, 32)  # is none
    assert len(language_linears(model)) == 8
    left_out = coverage(model).left_out
    assert not any("lora_A" in name for name in left_out)
    assert any("flora_fusion" in name for name in left_out)


@pytest.mark.parametrize(("name", "outputs"), [("num_experts", 8), ("num_local_experts", 8), ("num_v_heads", 4)])
def test_gates_with_one_output_per_head_or_expert_are_left_out(name, outputs):
    model = tiny_models.tiny_llava(layers=1)
    mlp = model.get_decoder().layers[0].mlp
    mlp.gate = nn.Linear(32, outputs)
    assert len(language_linears(model)) == 8
    setattr(mlp, name, outputs)
    assert len(language_linears(model)) == 7


def test_coverage_is_the_share_of_the_blocks_parameters():
    model = tiny_models.tiny_llava(layers=2)
    report = coverage(model)
    weights = sum(linear.weight.numel() for linear in language_linears(model).values())
    total = sum(p.numel() for p in model.get_decoder().layers.parameters())
    assert (report.quantized_size, report.total) == (weights, total)
    assert 0.97 < report.share == weights / total < 1
    assert set(report.left_out) == {
        f"model.language_model.layers.{i}.{kind}_layernorm.weight"
        for i in range(2)
        for kind in ("input", "post_attention")
    }


def test_experts_stacked_in_one_parameter_are_warned_about():
    model = tiny_models.tiny_llava(layers=1)
    model.get_decoder().layers[0].mlp.experts = nn.Parameter(torch.zeros(4, 32, 64))
    message = (
        r"rest of Llava.* only 52.7% .* the largest model\.language_model\.layers\.0\.mlp\.experts, .*of a mixture"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        assert len(language_linears(model)) == 7
    assert caught[0].filename == __file__


def test_models_without_a_decoder_or_linears_are_refused():
    with pytest.raises(ValueError, match=r"model must have a decoder: get_decoder\(\)"):
        language_linears(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="model must be a torch"):
        language_linears({"q_proj": nn.Linear(2, 2)})
    model = tiny_models.tiny_llava(layers=1)
    model.get_decoder().layers = nn.ModuleList([nn.Identity()])
    with pytest.raises(
        ValueError, match="decoder must have nn.Linear layers, got none in LlavaForConditionalGeneration"
    ):
        language_linears(model)


def test_the_support_table_is_of_these_families_and_of_this_transformers():
    """Else it is to be made anew: pytest tests/test_vlm_conformance*.py tests/test_vlm_distributed.py --support-table FILE."""
    table = json.loads((Path(__file__).parents[1] / "docs/guide/vlm_support.json").read_text())
    assert table["versions"]["transformers"] == version("transformers")
    assert table["families"].keys() == FAMILIES.keys()
    for name, cells in table["families"].items():
        missing = set(table["columns"]) - cells.keys()
        assert missing == (set() if FAMILIES[name].video else {"Video"})
        assert "no" not in cells.values()
