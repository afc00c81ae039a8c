"""The real shapes that several benchmarks time, with random weights."""

from __future__ import annotations

import torch
import transformers


def llava_7b():
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = transformers.LlamaConfig(vocab_size=32064)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)
    )


def qwen2_vl_2b():
    text = {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=True)
    )


def qwen2_vl_7b():
    text = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
    )


def built(build, device, dtype):
    """The model with random weights, made where and as it is used: nothing of float32 on the way."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return build().to(device)
    finally:
        torch.set_default_dtype(before)


def llava_batch(model, samples, text, image_size=336):
    """``samples`` prompts of one image and ``text`` tokens after it."""
    config = model.config
    tokens = (image_size // config.vision_config.patch_size) ** 2
    words = torch.randint(5, 1000, (samples, text), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.full((samples, tokens), config.image_token_id), words], dim=1)
    pixels = torch.randn(samples, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: value.to(model.device) for name, value in batch.items()}


def llava_for_cpus():
    """A LLaVA whose decoder of 0.4 billion weights two cores can read: eight layers of TinyLlama's shape."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=112,
        patch_size=14,
        projection_dim=256,
    )
    text = transformers.LlamaConfig(
        vocab_size=32064, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16
    )
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)
    )
