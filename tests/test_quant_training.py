"""A prepared model inside the ways people train: data parallel, adapters, checkpointing, compilation of the whole."""

import pytest
import torch
from ranks import run_ranks
from strategies import normal
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from gracekit.quant import LSQConfig, convert, prepare_qat, qat_parameter_groups

CONFIG = LSQConfig(group_size=16)


# transformers 5.23 renames what 5.17 and peft still call gradient checkpointing.
renamed = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16))
    prepare_qat(model, CONFIG)
    return model


def tiny_llama():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=50, **sizes))
    prepare_qat(model, CONFIG)
    return model


def freeze_weights(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("log_scale"))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def on_a_rank(rank, world):
    whole = normal(3, world * 6, 32, dtype=torch.float32)
    part = whole[rank * 6 : rank * 6 + 6]
    for frozen in (False, True):
        alone, shared = network(), network()
        if frozen:
            freeze_weights(alone)
            freeze_weights(shared)
        parallel = DistributedDataParallel(shared)
        optimizers = [torch.optim.AdamW(qat_parameter_groups(model, lr=1e-3)) for model in (alone, shared)]
        for _ in range(3):
            expected = gradients(alone, alone(whole).square().mean())
            found = gradients(shared, parallel(part).square().mean())
            assert found.keys() == expected.keys()
            assert frozen == all(name.endswith("log_scale") for name in found)
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
            for optimizer in optimizers:
                optimizer.step()


@pytest.mark.slow
def test_data_parallel_gradients_equal_those_of_one_process():
    run_ranks(on_a_rank)


def test_scales_alone_learn_when_the_weights_are_frozen():
    model = network()
    freeze_weights(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    groups = qat_parameter_groups(model, lr=1e-3)
    assert [len(group["params"]) for group in groups] == [2]
    optimizer = torch.optim.AdamW(groups)
    model(normal(1, 8, 32, dtype=torch.float32)).square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.endswith("log_scale")


@renamed
def test_gradient_checkpointing_of_a_language_model_changes_no_gradient():
    model = tiny_llama().train()
    ids = torch.arange(20).view(2, 10)
    plain = gradients(model, model(input_ids=ids, labels=ids).loss)
    model.gradient_checkpointing_enable()
    replayed = gradients(model, model(input_ids=ids, labels=ids).loss)
    assert replayed.keys() == plain.keys()
    assert all(torch.equal(replayed[name], gradient) for name, gradient in plain.items())


@pytest.mark.slow
def test_a_prepared_language_model_compiles_as_one_graph_with_the_same_gradients():
    model = tiny_llama().train()
    ids = torch.arange(20).view(2, 10)
    plain = gradients(model, model(input_ids=ids, use_cache=False).logits.square().mean())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = gradients(model, compiled(input_ids=ids, use_cache=False).logits.square().mean())
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient)


@renamed
def test_a_lora_adapter_trains_over_a_quantised_base_and_the_base_converts():
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        quantized = model(input_ids=ids).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    torch.testing.assert_close(adapted(input_ids=ids).logits, quantized)
    for name, parameter in adapted.named_parameters():
        if name.endswith("log_scale"):
            parameter.requires_grad_()
    found = gradients(adapted, adapted(input_ids=ids, labels=ids).loss)
    assert sum(name.endswith("log_scale") for name in found) == 14
    assert any("lora_B" in name and gradient.any() for name, gradient in found.items())
    adapted.eval()
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        convert(adapted, "reference")
        assert torch.equal(adapted(input_ids=ids).logits, before)
