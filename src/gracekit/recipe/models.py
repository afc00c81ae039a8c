"""The teacher and the students: LLaVA models of transformers' own classes, small enough for two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from gracekit._checks import check_int
from gracekit.recipe.data import IMAGE, PackedVqa, TeacherOutputs, VqaSplit, encode
from gracekit.recipe.weights import read_model
from gracekit.vlm import VisualTokenTap

IMAGE_SIZE = 64
PENULTIMATE = -2


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Size of one model; vision tower and language model are equally wide.

    Args:
        width: hidden size, a multiple of ``heads``.
        vision_layers: blocks of the vision tower.
        text_layers: blocks of the language model, at least 2.
        heads: attention heads.
        mlp_ratio: inner width of an MLP over ``width``.
        patch_size: pixels of a patch's side.
        image_size: pixels of an image's side, a multiple of ``patch_size``; (image_size / patch_size)**2 visual tokens.
    """

    width: int = 64
    vision_layers: int = 2
    text_layers: int = 2
    heads: int = 4
    mlp_ratio: int = 2
    patch_size: int = 8
    image_size: int = IMAGE_SIZE

    def __post_init__(self) -> None:
        for name in ("width", "vision_layers", "heads", "mlp_ratio", "patch_size", "image_size"):
            check_int(name, getattr(self, name), low=1)
        check_int("text_layers", self.text_layers, low=2)
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, got heads={self.heads} and width={self.width}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size must divide image_size, got patch_size={self.patch_size} and image_size={self.image_size}"
            )

    @property
    def image_tokens(self) -> int:
        """Visual tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


STUDENT = ModelSize()
TEACHER = ModelSize(width=96, vision_layers=4, text_layers=4)


def build_model(size: ModelSize, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlavaForConditionalGeneration:
    """Return a model with random weights for this tokenizer; its vocabulary is padded to a multiple of 16."""
    # At this width the usual spread of 0.02 leaves the image all but unread for hundreds of steps.
    spread = 0.64 / size.width**0.5
    blocks = {
        "hidden_size": size.width,
        "intermediate_size": size.width * size.mlp_ratio,
        "num_attention_heads": size.heads,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **blocks,
            num_hidden_layers=size.vision_layers,
            image_size=size.image_size,
            patch_size=size.patch_size,
            projection_dim=size.width,
        ),
        text_config=LlamaConfig(
            **blocks,
            num_hidden_layers=size.text_layers,
            num_key_value_heads=size.heads,
            vocab_size=-(-len(tokenizer) // 16) * 16,
            max_position_embeddings=max(256, 4 * size.image_tokens),
            initializer_range=spread,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        ),
        image_token_index=encode(tokenizer, [IMAGE])[0][0],
        image_seq_length=size.image_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.model.multi_modal_projector.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=spread)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def teacher_folder(path: str) -> Path:
    """Return the folder of a teacher; an empty path means the one in the package."""
    folder = Path(path) if path else Path(str(files("gracekit.recipe") / "assets" / "teacher"))
    missing = [
        name
        for name in ("config.json", "model.safetensors", "tokenizer.json", "training.json")
        if not (folder / name).is_file()
    ]
    if missing:
        raise ValueError(
            f"teacher must be a folder with a saved model, got {str(folder)!r} without {', '.join(missing)}"
        )
    return folder


def load_teacher(path: str) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerFast]:
    """Return a frozen teacher in float32, and its tokenizer.

    Raises:
        ValueError: the folder lacks a file or weights, or a file is damaged.
    """
    folder = teacher_folder(path)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        model = read_model(LlavaForConditionalGeneration, folder, dtype=torch.float32)
    except Exception as error:  # transformers, safetensors and tokenizers have an own one for every kind of damage
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"teacher must be a folder with a saved model, got {str(folder)!r}, which cannot be loaded: "
            f"{type(error).__name__}: {said}"
        ) from error
    return model.eval().requires_grad_(False), tokenizer


def image_tokens(model: LlavaForConditionalGeneration) -> int:
    """Return the number of visual tokens that one image has in a model."""
    vision = model.config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2)


@torch.no_grad()
def teacher_outputs(
    model: LlavaForConditionalGeneration,
    split: VqaSplit,
    tokenizer: PreTrainedTokenizerFast,
    *,
    batch_size: int = 32,
    advance: Any = lambda count: None,
) -> TeacherOutputs:
    """Return what a teacher says about all of a split, computed once: no training step runs it again.

    Args:
        model: the teacher.
        split: images and questions.
        tokenizer: the teacher's, which is also the student's.
        batch_size: scenes at a time.
        advance: called with the number of scenes done, for a progress bar.
    """
    device = next(model.parameters()).device
    packed = PackedVqa(split, tokenizer, image_tokens=image_tokens(model))
    logits = torch.empty(packed.supervised_count, model.config.text_config.vocab_size, dtype=torch.bfloat16)
    width = model.config.text_config.hidden_size
    visual = torch.zeros(packed.first_image[-1], image_tokens(model), width, dtype=torch.bfloat16)
    # Images with as many questions go together, so that little is padding.
    order = packed.lengths.argsort()
    with VisualTokenTap(model, layer=PENULTIMATE) as tap:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = {name: value.to(device) for name, value in packed.collate(rows.tolist()).items()}
            labels = batch.pop("labels")
            out = model(**batch, use_cache=False).logits
            tokens, _ = tap.tokens(batch)
            spans = packed.supervised[rows]
            # labels[i + 1] is what position i predicts.
            logits[spans[spans >= 0]] = out[:, :-1][labels[:, 1:] >= 0].to("cpu", torch.bfloat16)
            visual[packed.places(rows)] = tokens.view(-1, image_tokens(model), width).to("cpu", torch.bfloat16)
            advance(len(rows))
    return TeacherOutputs(logits, visual)


def parameter_count(model: nn.Module) -> int:
    """Return the number of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
