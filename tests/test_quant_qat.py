import copy
import functools

import pytest
import torch
from quant_cases import SMALL, Pair
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.qat import FakeQuantizedLinear, QATConfig
from torchao.quantization.qat.linear import disable_linear_fake_quant, enable_linear_fake_quant

from gracekit.quant import (
    LSQConfig,
    convert,
    coverage,
    export_awq,
    export_compressed_tensors,
    fully_shard_qat,
    import_grace_sidecar,
    load_qat,
    lsq_fake_quantize,
    prepare_qat,
    qat_parameter_groups,
    quantize_rtn,
    save_qat,
)


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def get_output_embeddings(self):
        return self.head


def test_a_model_with_a_decoder_gets_the_linears_of_its_blocks():
    model = Pair()
    names = prepare_qat(model, SMALL)
    assert names == [f"decoder.layers.{block}.{index}" for block in range(2) for index in range(2)]
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, kind in kinds.items() if issubclass(kind, FakeQuantizedLinear)} == set(names)


def test_any_other_model_gets_every_linear_but_its_head():
    assert prepare_qat(Headed(), SMALL) == ["body"]
    assert prepare_qat(nn.Sequential(nn.Linear(32, 4), nn.ReLU(), nn.Linear(16, 4)), SMALL) == ["0", "2"]


def test_the_filter_is_asked_about_linears_only_with_their_full_names():
    asked = []

    def only_vision(module, name):
        asked.append((type(module), name))
        return name == "vision"

    assert prepare_qat(Pair(), SMALL, filter_fn=only_vision) == ["vision"]
    assert {kind for kind, _ in asked} == {nn.Linear}
    assert {"vision", "head", "decoder.layers.0.0"} <= {name for _, name in asked}


def test_each_prepared_layer_has_a_float32_log_scale_of_one_number_per_group():
    model = Pair().to(torch.bfloat16)
    names = prepare_qat(model, SMALL)
    scales = {name: p for name, p in model.named_parameters() if name.endswith("log_scale")}
    assert list(scales) == [f"{name}.weight_fake_quantizer.log_scale" for name in names]
    assert all(
        scale.dtype == torch.float32 and scale.shape == (32, 2) and scale.requires_grad for scale in scales.values()
    )


def test_preparation_keeps_weights_biases_hooks_and_mode():
    layer = nn.Linear(32, 8)
    model = nn.Sequential(layer).eval()
    calls = []
    handles = [
        layer.register_forward_hook(lambda *_: calls.append("forward")),
        layer.register_full_backward_pre_hook(lambda *_: calls.append("before")),
        layer.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    state = torch.get_rng_state()
    prepare_qat(model, SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].weight is layer.weight
    assert model[0].bias is layer.bias
    assert not model[0].training
    model(torch.ones(1, 32, requires_grad=True)).sum().backward()
    for handle in handles:
        handle.remove()
    model(torch.ones(1, 32, requires_grad=True)).sum().backward()
    assert calls == ["forward", "before", "backward"]


def test_the_forward_is_the_fake_quantised_weights():
    model = nn.Sequential(nn.Linear(32, 8))
    prepare_qat(model, SMALL)
    x = torch.randn(3, 32)
    values = lsq_fake_quantize(model[0].weight, model[0].weight_fake_quantizer.log_scale, group_size=16)
    assert torch.equal(model(x), nn.functional.linear(x, values, model[0].bias))


def test_state_loads_into_a_freshly_prepared_model_without_a_forward():
    trained = Pair()
    prepare_qat(trained, SMALL)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    block = trained.decoder.layers[0]
    block(torch.randn(4, 32)).square().sum().backward()
    optimizer.step()
    fresh = Pair()
    prepare_qat(fresh, SMALL)
    assert fresh.load_state_dict(trained.state_dict(), strict=True) == ([], [])
    x = torch.randn(4, 32)
    assert torch.equal(fresh.decoder.layers[0](x), block(x))


def test_training_goes_on_bit_for_bit_from_a_saved_state(tmp_path):
    x = torch.randn(20, 4, 32)

    def start():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
        prepare_qat(model, SMALL)
        return model, torch.optim.AdamW(qat_parameter_groups(model, lr=1e-2))

    def steps(model, optimizer, batches):
        for batch in batches:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

    through, optimizer = start()
    steps(through, optimizer, x[:10])
    save_file(through.state_dict(), tmp_path / "model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    steps(through, optimizer, x[10:])

    resumed, optimizer = start()
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"))
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(resumed, optimizer, x[10:])
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    prepare_qat(model, SMALL)
    x = torch.randn(4, 32, requires_grad=True)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), plain, strict=True))


def test_inference_mode_computes_the_same():
    model = nn.Sequential(nn.Linear(32, 8))
    prepare_qat(model, SMALL)
    x = torch.randn(3, 32)
    with torch.inference_mode():
        result = model(x)
    assert torch.equal(result, model(x))


def test_torchaos_quantize_prepares_the_same_layers():
    ours, theirs = Headed(), Headed()
    theirs.load_state_dict(ours.state_dict())
    prepare_qat(ours, SMALL)
    quantize_(theirs, SMALL, lambda module, name: name == "body")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_torchao_can_switch_the_fake_quantiser_off_and_on():
    plain = nn.Sequential(nn.Linear(32, 8))
    model = copy.deepcopy(plain)
    prepare_qat(model, SMALL)
    x = torch.randn(3, 32)
    quantized = model(x)
    model.apply(disable_linear_fake_quant)
    assert torch.equal(model(x), plain(x))
    model.apply(enable_linear_fake_quant)
    assert torch.equal(model(x), quantized)


def test_training_lowers_the_loss_of_a_small_regression():
    x, y = torch.randn(256, 32), torch.randn(256, 8)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    prepare_qat(model, LSQConfig(bits=3, group_size=16))
    before = [p.detach().clone() for n, p in model.named_parameters() if n.endswith("log_scale")]
    optimizer = torch.optim.AdamW(qat_parameter_groups(model, lr=2e-3))
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    after = [p for n, p in model.named_parameters() if n.endswith("log_scale")]
    assert all(bool((a != b).any()) for a, b in zip(after, before, strict=True))


def test_a_module_in_two_places_is_replaced_in_both():
    layer = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)})
    assert prepare_qat(model, SMALL) == ["a.0"]
    assert model["a"][0] is model["b"][0]
    assert isinstance(model["b"][0], FakeQuantizedLinear)


def shared():
    model = nn.Sequential(nn.Linear(32, 32), nn.Embedding(32, 32))
    model[1].weight = model[0].weight
    return model


def infinite():
    model = nn.Sequential(nn.Linear(32, 32))
    nn.init.constant_(model[0].weight, float("inf"))
    return model


def twice():
    model = nn.Sequential(nn.Linear(32, 32))
    prepare_qat(model, SMALL)
    return model


def half_fitting():
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(24, 32))


def without_outputs():
    model = nn.Sequential(nn.Linear(32, 1))
    model[0].out_features, model[0].weight = 0, nn.Parameter(torch.empty(0, 32))
    return model


def feed_forward():
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    layer.self_attn.out_proj = nn.Identity()  # refused for another reason
    return layer


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Sequential(nn.ReLU()), "model must have an nn.Linear that the default selection takes"),
        (lambda: nn.Linear(32, 32), "model must contain the layers to replace"),
        (half_fitting, r"group_size must divide in_features, got group_size=16 and in_features=24 \(1\)"),
        (lambda: nn.Sequential(nn.Linear(32, 32, device="meta")), r"meta device \(0\)"),
        (shared, "one shared by 0.weight and 1.weight"),
        (infinite, r"finite, got NaN or infinity \(0\)"),
        (twice, r"quantised already, got LSQLinear .*\(0\)"),
        (
            lambda: quantize_rtn(nn.Sequential(nn.Linear(32, 32)), SMALL, target="reference"),
            r"IntxUnpackedToInt8Tensor \(0\)",
        ),
        (without_outputs, r"a layer must have outputs, got out_features=0 \(0\)"),
        (feed_forward, r"got one of an nn.TransformerEncoderLayer, .* \(linear1\)"),
        (lambda: nn.MultiheadAttention(32, 2), r"plain nn.Linear, .* got NonDynamicallyQuantizableLinear \(out_proj\)"),
    ],
)
@pytest.mark.parametrize("act", [prepare_qat, quantize_rtn])
def test_a_model_that_cannot_be_prepared_is_refused_unchanged(make, match, act):
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=match):
        act(model, SMALL)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_filter_that_takes_nothing_is_refused():
    with pytest.raises(ValueError, match="filter_fn takes, got none in Pair"):
        prepare_qat(Pair(), SMALL, filter_fn=lambda module, name: False)
    with pytest.raises(TypeError, match="filter_fn must be a function of a module and its name, got 'decoder'"):
        prepare_qat(Pair(), SMALL, filter_fn="decoder")


@pytest.mark.parametrize("act", [prepare_qat, quantize_rtn])
def test_a_configuration_of_another_kind_is_refused(act):
    with pytest.raises(TypeError, match="config must be an LSQConfig, got int"):
        act(Pair(), 4)


@pytest.mark.parametrize(
    "act",
    [
        prepare_qat,
        quantize_rtn,
        convert,
        coverage,
        fully_shard_qat,
        functools.partial(qat_parameter_groups, lr=1.0),
        functools.partial(import_grace_sidecar, path="file.pt"),
        functools.partial(save_qat, directory="folder"),
        functools.partial(load_qat, directory="folder"),
    ],
)
def test_what_is_no_module_is_refused(act):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        act(3)


@pytest.mark.parametrize("base", [None, IntxWeightOnlyConfig(torch.int4, PerGroup(16))])
def test_torchaos_convert_step_is_refused_instead_of_dropping_the_scales(base):
    model = nn.Sequential(nn.Linear(32, 32))
    quantize_(model, SMALL)
    with pytest.raises(ValueError, match=r"converted by gracekit.quant.convert\(model, target\)"):
        quantize_(model, QATConfig(base, step="convert"))


def test_weights_tied_after_preparation_are_refused_by_whatever_would_untie_them(tmp_path):
    model = nn.ModuleDict({"embedding": nn.Embedding(32, 32), "head": nn.Linear(32, 32, bias=False)})
    quantize_(model, SMALL, lambda module, name: name == "head")
    model["embedding"].weight = model["head"].weight
    for act in (
        lambda: convert(model, "reference"),
        lambda: export_awq(model, tmp_path / "a"),
        lambda: export_compressed_tensors(model, tmp_path / "b"),
        lambda: save_qat(model, tmp_path / "c"),
    ):
        with pytest.raises(ValueError, match=r"one layer alone, got one shared by embedding.weight and head.weight"):
            act()
