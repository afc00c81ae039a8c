"""What compressed-tensors and transformers make of an exported folder; skipped where compressed-tensors is not installed."""

import pytest
import torch
from tiny_families import FAMILIES
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gracekit.quant import LSQConfig, convert, export_compressed_tensors, prepare_qat
from gracekit.quant.formats.compressed_tensors import pack_compressed
from gracekit.quant.int4 import read_weight

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors.pack_quantized import helpers


def tiny_llama(dtype, *, tied):
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, False), (torch.bfloat16, True)])
def test_transformers_loads_an_export_with_the_trained_logits(tmp_path, dtype, tied):
    model = tiny_llama(dtype, tied=tied)
    assert len(prepare_qat(model, LSQConfig(group_size=32))) == 14
    ids = torch.arange(12)[None]
    with torch.no_grad():
        trained = model(ids).logits
    export_compressed_tensors(convert(model, "portable"), tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.dtype == dtype
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl"])
def test_transformers_loads_an_exported_vision_language_model(tmp_path, name):
    model = FAMILIES[name].build(seed=1)
    batch = FAMILIES[name].batch(["ttIt", "tttt"])
    prepare_qat(model, LSQConfig(group_size=32))
    with torch.no_grad():
        trained = model(**batch).logits
    export_compressed_tensors(model, tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trained)


def test_packed_words_are_those_of_compressed_tensors():
    for bits in (2, 4, 8):
        fresh = torch.nn.Sequential(torch.nn.Linear(64, 16))
        prepare_qat(fresh, LSQConfig(bits=bits, group_size=32))
        weight = read_weight(fresh[0])
        assert torch.equal(pack_compressed(weight)["weight_packed"], helpers.pack_to_int32(weight.codes, bits))
