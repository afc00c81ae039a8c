"""Vision-language models of real classes with random weights, small enough for a CPU, and batches to feed them.

A batch is written as one string per sample: "t" a text token, "I" an image, "V" a video. ``tiny_llava()`` and
``tiny_qwen2_vl()`` give the models; ``llava_batch(model, ["tIt", "tIIt"])`` and ``qwen2_vl_batch`` their input.
"""

import functools

import torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

LLAVA_TOKENS = 9  # an image of 12 x 12 in patches of 4 x 4, class token dropped
# Grids (frames, height, width) in patches; 2 x 2 patches make a token, so these images have 4, 6 and 8 tokens.
GRIDS = [(1, 4, 4), (1, 4, 6), (1, 8, 4)]
VIDEO_GRID = (2, 4, 4)


def text_size(width, layers):
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }


def tiny_llava(*, seed=0, width=32, layers=3, vocab_size=128, image_token_id=120, image_size=12, **text):
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(vocab_size=vocab_size, **text_size(width, layers), **text),
        image_token_index=image_token_id,
    )
    return LlavaForConditionalGeneration(config).eval()


def tiny_qwen2_vl(*, seed=0, width=32, layers=3, vocab_size=128, image_token_id=120, video_token_id=121, **text):
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        vision_config={
            "embed_dim": 16, "hidden_size": width, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        },
        text_config={"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2, "rope_parameters": rope,
            **text_size(width, layers), **text,
        },
        image_token_id=image_token_id, video_token_id=video_token_id,
        vision_start_token_id=122, vision_end_token_id=123,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config).eval()


def token_ids(samples, visual, *, padding="left", seed=0):
    """Ids and attention mask for ``samples``; ``visual`` maps "I" and "V" to an iterator of runs of placeholder ids."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for sample in samples:
        row = []
        for letter in sample:
            row += [int(torch.randint(1, 100, (), generator=generator))] if letter == "t" else next(visual[letter])
        rows.append(row)
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    left = padding == "left"
    ids = [pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)]
    mask = [pad + [1] * len(row) if left else [1] * len(row) + pad for row, pad in zip(rows, pads, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def image_counts(samples, letter="I"):
    return sum(sample.count(letter) for sample in samples)


def llava_batch(model, samples=("ttIt", "tItIt", "tttt"), *, padding="left", seed=0):
    count = image_counts(samples)
    run = [model.config.image_token_id] * LLAVA_TOKENS
    batch = token_ids(samples, {"I": iter([run] * count)}, padding=padding, seed=seed)
    if count:
        batch["pixel_values"] = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed + 1))
    return batch


def qwen2_vl_batch(model, samples=("ttIt", "tItIt", "tttt"), *, padding="left", seed=0):
    config, generator = model.config, torch.Generator().manual_seed(seed + 1)
    images = [GRIDS[i % len(GRIDS)] for i in range(image_counts(samples))]
    videos = [VIDEO_GRID] * image_counts(samples, "V")
    visual = {
        "I": iter([[122] + [config.image_token_id] * grid_tokens(grid) + [123] for grid in images]),
        "V": iter([[122] + [config.video_token_id] * grid_tokens(grid) + [123] for grid in videos]),
    }
    batch = token_ids(samples, visual, padding=padding, seed=seed)
    ids = batch["input_ids"]
    batch["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    for grids, pixels, grid in ((images, "pixel_values", "image"), (videos, "pixel_values_videos", "video")):
        if grids:
            patches = sum(t * h * w for t, h, w in grids)
            batch[pixels] = torch.randn(patches, 3 * 2 * 4 * 4, generator=generator)
            batch[f"{grid}_grid_thw"] = torch.tensor(grids)
    return batch


def grid_tokens(grid):
    return grid[0] * grid[1] * grid[2] // 4


def checkpoint_activations(model, *, reentrant, hooks_inside=False):
    """Checkpoint every block. ``hooks_inside``: module hooks included, so that they run again in the backward pass.

    Which of the two transformers does changed in 5.23; both must work.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    model.enable_input_require_grads()
    if not hooks_inside:
        enable({"use_reentrant": reentrant})
        return
    for layer in model.get_decoder().layers:
        kind = type(layer)

        class Replayed(kind):
            def __call__(self, *args, kind=kind, **kwargs):
                run = functools.partial(kind.__call__, self, **kwargs)
                return checkpoint(run, *args, use_reentrant=reentrant)

        layer.__class__ = Replayed


PAIRS = {"llava": (tiny_llava, llava_batch), "qwen2_vl": (tiny_qwen2_vl, qwen2_vl_batch)}
