"""One tiny random model of each vision-language family, with input for it, for the conformance suite.

Each family says how to build its model from configuration classes, how one image is spelled in token ids, and which
tensors hold the pixels. Everything else about it the library must find by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import tiny_models
import torch
import transformers
from tiny_models import text_size

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
IMAGE, VIDEO, START, END = 120, 121, 122, 123
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIGLIP = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Family:
    """``image(i)`` spells image i in ids; ``pixels(samples)`` gives the tensors; ``lengths(samples)`` what the tap finds."""

    build: Callable[..., torch.nn.Module]
    image: Callable[[int], list[int]]
    pixels: Callable[[list[str]], dict[str, torch.Tensor]]
    lengths: Callable[[list[str]], list[int]]
    quantised: tuple[str, ...] = PROJECTIONS  # names of the quantised layers, those of all blocks together
    share: float = 0.97  # at least that much of the blocks' parameters is quantised
    extra: Callable[[torch.Tensor], dict[str, torch.Tensor]] = field(default=lambda ids: {})
    video: list[int] | None = None  # one video in ids
    video_pixels: Callable[[int], dict[str, torch.Tensor]] | None = None  # of that many videos

    def batch(self, samples, *, padding="left"):
        count, videos = tiny_models.image_counts(samples), tiny_models.image_counts(samples, "V")
        visual = {"I": iter([self.image(i) for i in range(count)]), "V": iter([self.video] * videos)}
        batch = tiny_models.token_ids(samples, visual, padding=padding)
        batch |= self.extra(batch["input_ids"])
        batch |= self.pixels(samples) if count else {}
        return batch | (self.video_pixels(videos) if videos else {})


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def stacked(samples):
    """(images, 3, 12, 12), as the LLaVA line takes them."""
    return {"pixel_values": normal(tiny_models.image_counts(samples), 3, 12, 12)}


def each(count):
    return lambda samples: [count] * tiny_models.image_counts(samples)


def seeded(model_class, make_config):
    def build(*, layers=4, width=32, seed=0, vocab_size=128):
        torch.manual_seed(seed)
        return model_class(make_config(text_size(width, layers) | {"vocab_size": vocab_size})).eval()

    return build


def text(kind, size, **more):
    config = getattr(transformers, kind)
    return config(**size, bos_token_id=1, eos_token_id=2, pad_token_id=0, **more)


def anyres(samples):
    """Images of 12 x 24 in two tiles of 12 x 12, and the base tile that goes before them."""
    count = tiny_models.image_counts(samples)
    return {"pixel_values": normal(count, 3, 3, 12, 12), "image_sizes": torch.tensor([[12, 24]] * count)}


ANYRES_TOKENS = 9 + 3 * 6 + 3  # base tile, the two tiles side by side, a newline for each of three rows


def by_sample(samples):
    """(B, images, 3, 16, 16), samples with fewer images padded with zeros."""
    most = max(sample.count("I") for sample in samples)
    pixels = torch.stack([normal(most, 3, 16, 16) for _ in samples])
    for row, sample in zip(pixels, samples, strict=True):
        row[sample.count("I") :] = 0
    return {"pixel_values": pixels}


def gridded(samples):
    grids = [GRIDS[i % 3] for i in range(tiny_models.image_counts(samples))]
    patches = sum(t * h * w for t, h, w in grids)
    return {"pixel_values": normal(patches, 96), "image_grid_thw": torch.tensor(grids)}


def grid_video(count):
    t, h, w = tiny_models.VIDEO_GRID
    return {"pixel_values_videos": normal(count * t * h * w, 96), "video_grid_thw": torch.tensor([[t, h, w]] * count)}


def token_types(ids):
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN_VISION = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip


def qwen(model, config, *, text_more=(), vision_more=(), frames_apart=False, **more):
    """A family of the Qwen-VL line; from the third on the frames of a video have a time stamp between them."""

    def make_config(size):
        unit = size["hidden_size"] // 32 if "head_dim" not in dict(text_more) else 1
        rope = {"rope_type": "default", "mrope_section": [unit, unit, 2 * unit], "rope_theta": 10000.0}
        texts = {**size, "bos_token_id": 1, "eos_token_id": 2, "rope_parameters": rope, **dict(text_more)}
        if "linear_num_value_heads" in texts:
            texts["layer_types"] = ["linear_attention", "full_attention"] * (size["num_hidden_layers"] // 2)
        vision = {**QWEN_VISION, "out_hidden_size": size["hidden_size"], **dict(vision_more)}
        if "embed_dim" in vision:  # the first of the line calls by hidden_size what later ones call out_hidden_size
            vision["hidden_size"] = vision.pop("out_hidden_size")
        return getattr(transformers, config)(vision_config=vision, text_config=texts, **QWEN_IDS)

    frame = [VIDEO] * 4
    return Family(
        build=seeded(getattr(transformers, model), make_config),
        image=lambda i: [START] + [IMAGE] * tiny_models.grid_tokens(GRIDS[i % 3]) + [END],
        pixels=gridded,
        lengths=lambda samples: (
            [tiny_models.grid_tokens(GRIDS[i % 3]) for i in range(tiny_models.image_counts(samples))]
            + [8] * tiny_models.image_counts(samples, "V")
        ),
        extra=token_types,
        video=[START, *frame, END, START, *frame, END] if frames_apart else [START, *frame, *frame, END],
        video_pixels=grid_video,
        **more,
    )


def idefics(model, config):
    return Family(
        build=seeded(
            getattr(transformers, model),
            lambda size: getattr(transformers, config)(
                vision_config={**SIGLIP, "image_size": 16},
                text_config=text("LlamaConfig", size),
                image_token_id=IMAGE,
                scale_factor=2,
                pad_token_id=0,
            ),
        ),
        image=lambda i: [START] + [IMAGE] * 4 + [END],
        pixels=by_sample,
        # Listed by image up to 5.19, by sample since.
        lengths=each(4) if VERSION < (5, 20) else lambda samples: [4 * s.count("I") for s in samples if "I" in s],
    )


def mistral_image(i):
    """Rows of merged patches, each closed by a break token."""
    height, width = MISTRAL_SIZES[i % 2]
    return ([IMAGE] * (width // 8) + [START]) * (height // 8)


def mistral_pixels(samples):
    sizes = [MISTRAL_SIZES[i % 2] for i in range(tiny_models.image_counts(samples))]
    return {"pixel_values": normal(len(sizes), 3, 16, 24), "image_sizes": torch.tensor(sizes)}


DELTANET = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
DEEPSTACK = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
MISTRAL_SIZES = [(16, 16), (16, 24)]
GRIDS = tiny_models.GRIDS
CLIP_TILES = {**SIGLIP, "image_size": 12, "patch_size": 4}

FAMILIES = {
    "paligemma": Family(
        build=seeded(
            transformers.PaliGemmaForConditionalGeneration,
            lambda size: transformers.PaliGemmaConfig(
                vision_config=transformers.SiglipVisionConfig(
                    **SIGLIP, projection_dim=size["hidden_size"], vision_use_head=False
                ),
                text_config=text("GemmaConfig", size, head_dim=8),
                image_token_index=IMAGE,
                projection_dim=size["hidden_size"],
            ),
        ),
        image=lambda i: [IMAGE] * 9,
        pixels=stacked,
        lengths=each(9),
    ),
    "internvl": Family(
        build=seeded(
            transformers.InternVLForConditionalGeneration,
            lambda size: transformers.InternVLConfig(
                vision_config={**SIGLIP, "image_size": [16, 16], "patch_size": [4, 4]},
                text_config=text("Qwen2Config", size),
                image_token_id=IMAGE,
                downsample_ratio=0.5,
            ),
        ),
        image=lambda i: [START] + [IMAGE] * 4 + [END],
        pixels=lambda samples: {"pixel_values": normal(tiny_models.image_counts(samples), 3, 16, 16)},
        lengths=each(4),
    ),
    "gemma3": Family(
        build=seeded(
            transformers.Gemma3ForConditionalGeneration,
            lambda size: transformers.Gemma3Config(
                vision_config=transformers.SiglipVisionConfig(**{**SIGLIP, "image_size": 16}, vision_use_head=False),
                text_config=text("Gemma3TextConfig", size, head_dim=8, sliding_window=64),
                image_token_index=IMAGE,
                boi_token_index=START,
                eoi_token_index=END,
                mm_tokens_per_image=4,
            ),
        ),
        image=lambda i: [START] + [IMAGE] * 4 + [END],
        pixels=lambda samples: {"pixel_values": normal(tiny_models.image_counts(samples), 3, 16, 16)},
        lengths=each(4),
        extra=lambda ids: {"token_type_ids": (ids == IMAGE).long()},
    ),
    "llava": Family(
        build=lambda layers=4, **size: tiny_models.tiny_llava(layers=layers, **size),
        image=lambda i: [IMAGE] * 9,
        pixels=stacked,
        lengths=each(9),
    ),
    "llava_next": Family(
        build=seeded(
            transformers.LlavaNextForConditionalGeneration,
            lambda size: transformers.LlavaNextConfig(
                vision_config=transformers.CLIPVisionConfig(**SIGLIP),
                text_config=text("MistralConfig", size),
                image_token_index=IMAGE,
                image_grid_pinpoints=[[12, 24], [24, 12], [24, 24]],
            ),
        ),
        image=lambda i: [IMAGE] * ANYRES_TOKENS,
        pixels=anyres,
        lengths=each(ANYRES_TOKENS),
    ),
    "llava_onevision": Family(
        build=seeded(
            transformers.LlavaOnevisionForConditionalGeneration,
            lambda size: transformers.LlavaOnevisionConfig(
                vision_config=transformers.SiglipVisionConfig(**SIGLIP, vision_use_head=False),
                text_config=text("Qwen2Config", size),
                image_token_index=IMAGE,
                video_token_index=VIDEO,
                image_grid_pinpoints=[[12, 24], [24, 12], [24, 24]],
            ),
        ),
        image=lambda i: [IMAGE] * ANYRES_TOKENS,
        pixels=anyres,
        lengths=lambda samples: each(ANYRES_TOKENS)(samples) + [9] * tiny_models.image_counts(samples, "V"),
        # Two frames pooled to 2 x 2, and a newline, which was no part of the features before 5.18.
        video=[VIDEO] * 9 if VERSION >= (5, 18) else None,
        video_pixels=lambda count: {"pixel_values_videos": normal(count, 2, 3, 12, 12)},
    ),
    "mistral3": Family(
        build=seeded(
            transformers.Mistral3ForConditionalGeneration,
            lambda size: transformers.Mistral3Config(
                vision_config=transformers.PixtralVisionConfig(**{**SIGLIP, "image_size": 24}, head_dim=8),
                text_config=text("MistralConfig", size, head_dim=8),
                image_token_index=IMAGE,
                tie_word_embeddings=False,
            ),
        ),
        image=mistral_image,
        pixels=mistral_pixels,
        lengths=lambda samples: [(4, 6)[i % 2] for i in range(tiny_models.image_counts(samples))],
    ),
    "idefics3": idefics("Idefics3ForConditionalGeneration", "Idefics3Config"),
    "smolvlm": idefics("SmolVLMForConditionalGeneration", "SmolVLMConfig"),
    "qwen2_vl": qwen(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        vision_more={"embed_dim": 16, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": qwen(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        vision_more={"window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": qwen(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        text_more={"head_dim": 8},
        vision_more=DEEPSTACK,
        frames_apart=True,
    ),
    "qwen3_vl_moe": qwen(
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        text_more={"head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
        vision_more=DEEPSTACK,
        frames_apart=True,
        quantised=PROJECTIONS[:4],
        share=0.15,
    ),
    "qwen3_5": qwen(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        text_more=DELTANET,
        vision_more={"num_position_embeddings": 16},
        frames_apart=True,
        quantised=("in_proj_qkv", "in_proj_z", "out_proj", *PROJECTIONS),
        share=0.93,  # the convolutions and norms of a tiny DeltaNet are not small beside its projections
    ),
}
