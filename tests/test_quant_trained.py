"""Folders of models in training: save_qat and load_qat."""

import copy
import functools
import json

import numpy
import pytest
import torch
from quant_cases import SMALL, Pair
from safetensors.torch import load_model, save_file
from tiny_models import llava_batch, tiny_llava, tiny_qwen2_vl
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaConfig, LlamaForCausalLM

from gracekit.quant import LSQConfig, convert, load_qat, prepare_qat, qat_parameter_groups, save_qat
from gracekit.quant.formats.trained import SCALES_FILE


def tiny_llama(dtype=torch.float32):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=2, vocab_size=100, tie_word_embeddings=True, **sizes)
    return LlamaForCausalLM._from_config(config, dtype=dtype)


def train(model, steps, optimizer):
    ids = torch.arange(24).view(2, 12)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_bit_for_bit_from_a_folder(tmp_path, dtype):
    through = tiny_llama(dtype)
    names = prepare_qat(through, LSQConfig(bits=3, group_size=32, scale_dtype=torch.float16))
    optimizer = torch.optim.AdamW(qat_parameter_groups(through, lr=1e-3))
    train(through, 3, optimizer)
    save_qat(through, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())

    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    resumed = loaded.train()
    assert load_qat(resumed, tmp_path) == names
    again = torch.optim.AdamW(qat_parameter_groups(resumed, lr=1e-3))
    again.load_state_dict(state)
    train(through, 2, optimizer)
    train(resumed, 2, again)
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("make", [tiny_llava, tiny_qwen2_vl])
def test_families_that_name_their_tensors_otherwise_in_files_load_the_same_model(tmp_path, make):
    model = make()
    names = prepare_qat(model, LSQConfig(group_size=32))
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).weight_fake_quantizer.log_scale.add_(0.1)
    save_qat(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype="auto")
    assert load_qat(loaded, tmp_path) == names
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_what_was_saved_converts_to_the_answers_of_training(tmp_path):
    model = tiny_llava()
    prepare_qat(model, LSQConfig(group_size=32))
    batch = llava_batch(model, ["tIt"])
    with torch.no_grad():
        trained = model(**batch).logits
    save_qat(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype="auto")
    load_qat(loaded, tmp_path)
    with torch.no_grad():
        assert torch.equal(convert(loaded, "reference")(**batch).logits, trained)


def test_any_module_saves_and_layers_may_differ(tmp_path):
    model = Pair()
    prepare_qat(model, SMALL)
    prepare_qat(model, LSQConfig(bits=8, group_size=32), filter_fn=lambda module, name: name == "vision")
    save_qat(model, tmp_path)
    fresh = Pair()
    load_model(fresh, tmp_path / "model.safetensors")
    load_qat(fresh, tmp_path)
    assert fresh.vision.weight_fake_quantizer.config == LSQConfig(bits=8, group_size=32)
    assert fresh.decoder.layers[0][0].weight_fake_quantizer.config == SMALL
    assert fresh.load_state_dict(model.state_dict()) == ([], [])


def test_a_layer_in_two_places_is_saved_and_taken_up(tmp_path):
    def shared():
        model = nn.ModuleDict({"a": nn.Linear(32, 8), "c": nn.Linear(32, 8)})
        model["b"] = model["a"]
        return model

    model = shared()
    prepare_qat(model, LSQConfig(group_size=32))
    save_qat(model, tmp_path)
    fresh = shared()
    load_model(fresh, tmp_path / "model.safetensors")
    load_qat(fresh, tmp_path)
    assert fresh["b"] is fresh["a"]
    assert fresh.load_state_dict(model.state_dict()) == ([], [])
    assert torch.equal(fresh["b"](torch.ones(1, 32)), model["b"](torch.ones(1, 32)))


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model must have a quantised layer"):
        save_qat(Pair(), tmp_path)
    model = Pair()
    prepare_qat(model, SMALL)
    converted = convert(model, "reference")
    with pytest.raises(ValueError, match=r"must still train .* got a converted IntxUnpackedToInt8Tensor \(decoder"):
        save_qat(converted, tmp_path)
    assert not any(tmp_path.iterdir())
    for wrapper in (nn.DataParallel, AveragedModel, functools.partial(torch.compile, backend="eager")):
        model = Pair()
        prepare_qat(model, SMALL)
        with pytest.raises(ValueError, match="model must be the one inside its wrapper, got "):
            save_qat(wrapper(model), tmp_path)
    model.lora_A = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"model must have no adapters left .*, got lora_A.weight"):
        save_qat(model, tmp_path)
    assert not any(tmp_path.iterdir())
    model = Pair()
    prepare_qat(model, LSQConfig(bits=numpy.int64(4), group_size=numpy.int32(16)))
    save_qat(model, tmp_path)
    with pytest.raises(FileExistsError, match=r"got model.safetensors, learned_scales.safetensors"):
        save_qat(model, tmp_path)


def test_a_model_that_does_not_fit_the_folder_is_refused_unchanged(tmp_path):
    pair = Pair()
    prepare_qat(pair, SMALL)
    save_qat(pair, tmp_path)

    def other():
        model = Pair()
        model.decoder.layers[1][1] = nn.Identity()
        return model

    def wider():
        model = Pair()
        model.decoder.layers[1][1] = nn.Linear(32, 64)
        return model

    def tied():
        model = Pair()
        model.decoder.layers[1][1].weight = model.vision.weight
        return model

    for make, match in [
        (other, r"got none called 'decoder.layers.1.1'"),
        (lambda: Pair().bfloat16(), r"trained in, torch.float32 .* got torch.bfloat16 \(decoder.layers.0.0\)"),
        (wider, r"log_scale must have the shape \(64, 2\), got \(32, 2\) \(decoder.layers.1.1\)"),
        (tied, "shared by vision.weight and decoder.layers.1.1.weight"),
    ]:
        model = make()
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=match):
            load_qat(model, tmp_path)
        assert [type(module) for module in model.modules()] == kinds


def test_a_folder_without_scales_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="got no learned_scales.safetensors in"):
        load_qat(Pair(), tmp_path)
    (tmp_path / SCALES_FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="must be a file of learned scales, got SafetensorError"):
        load_qat(Pair(), tmp_path)
    good = {"bits": 4, "group_size": 32, "scale_dtype": "bfloat16", "weight_dtype": "float32"}
    bad = [{"b": good}, {"a": good, "b": good}, {"a": {}}, {"a": good | {"scale_dtype": "wide"}}, [1]]
    for note in ({}, {"layers": "{"}, *({"layers": json.dumps(layers)} for layers in bad)):
        save_file({"a": torch.zeros(1)}, tmp_path / SCALES_FILE, metadata=note)
        with pytest.raises(ValueError, match="must be a file of learned scales"):
            load_qat(Pair(), tmp_path)
    for scales, said in ((torch.full((1,), torch.nan), "NaN or infinity"), (torch.zeros(1).half(), "torch.float16")):
        save_file({"a": scales}, tmp_path / SCALES_FILE, metadata={"layers": json.dumps({"a": good})})
        with pytest.raises(ValueError, match=rf"must be finite numbers of float32, got {said} \(a in"):
            load_qat(Pair(), tmp_path)
