"""Saving with save_pretrained, loading with plain from_pretrained, for the forms that are meant for files."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import llava_batch, tiny_llava, tiny_qwen2_vl
from torch import nn
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from gracekit.quant import LSQConfig, convert, export_awq, export_compressed_tensors, prepare_qat, quantize_rtn
from gracekit.quant.int4 import read_weight


def tiny_llama(dtype=torch.float32):
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("target", ["portable", "reference"])
@pytest.mark.parametrize("make", [tiny_llava, tiny_qwen2_vl, tiny_llama])
def test_a_saved_model_loads_with_the_trained_codes_and_scales(tmp_path, make, target):
    model = make()
    names = prepare_qat(model, LSQConfig(group_size=32))
    held = {name: read_weight(model.get_submodule(name)) for name in names}
    convert(model, target).save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, weight in held.items():
        again = read_weight(loaded.get_submodule(name))
        assert torch.equal(again.codes, weight.codes)
        assert torch.equal(again.scale.double(), weight.scale.double())
    others = {key: value for key, value in model.state_dict().items() if key.removesuffix(".weight") not in names}
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in others.items())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_loaded_reference_computes_the_trained_logits(tmp_path, bits):
    model = tiny_llama()
    prepare_qat(model, LSQConfig(bits=bits, group_size=16))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        trained = model(ids).logits
    convert(model, "reference").save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits, trained)


def test_a_loaded_portable_model_of_eight_bits_computes_the_trained_logits(tmp_path):
    model = tiny_llama()
    prepare_qat(model, LSQConfig(bits=8, group_size=32))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        trained = model(ids).logits
    convert(model, "portable").save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits, trained)


def test_a_loaded_portable_model_converts_to_the_kernel_and_computes_what_was_trained(tmp_path):
    model = tiny_llava()
    prepare_qat(model, LSQConfig(group_size=32))
    batch = llava_batch(model, ["tIt", "ttt"])
    with torch.no_grad():
        trained = model(**batch).logits
    convert(model, "portable").save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(convert(loaded, "cpu")(**batch).logits, trained, rtol=1e-4, atol=1e-5)


def test_a_saved_reference_loads_without_this_library(tmp_path):
    quantize_rtn(tiny_llama(), LSQConfig(group_size=32), target="reference").save_pretrained(tmp_path)
    program = (
        "import sys; sys.modules['gracekit'] = None; import torch; from transformers import AutoModelForCausalLM as auto;"
        f"print(auto.from_pretrained({str(tmp_path)!r})(torch.arange(4)[None]).logits.shape)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "torch.Size([1, 4, 100])"


def test_packed_bytes_of_a_kernel_are_not_written(tmp_path):
    model = quantize_rtn(tiny_llama(), LSQConfig(group_size=32), target="cpu")
    with pytest.raises(ValueError, match="Unsupported tensor type.*Int4OpaqueTensor"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("export", [export_awq, export_compressed_tensors])
def test_an_export_carries_the_models_configuration(tmp_path, export):
    model = tiny_llama(torch.bfloat16)
    prepare_qat(model, LSQConfig(group_size=32))
    export(convert(model, "portable"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == ("float16" if export is export_awq else "bfloat16")
    assert (tmp_path / "generation_config.json").exists()
    skipped = config["quantization_config"].get("ignore") or config["quantization_config"]["modules_to_not_convert"]
    assert skipped == ["lm_head"]


def test_default_layers_of_a_vision_language_model_are_its_decoders():
    model = tiny_llava()
    names = prepare_qat(model, LSQConfig(group_size=32))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert names == [name for name in linears if ".language_model.layers." in name]
    assert len(names) == 7 * 3
