"""A trained student of the small recipe as a folder that any program of transformers reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast

from gracekit.quant import save_qat
from gracekit.quant.formats.trained import SCALES_FILE
from gracekit.recipe.data import ASSISTANT, BOS, EOS, IMAGE, USER

# One question after its images, as the students are trained.
TEMPLATE = (
    f"{BOS}{{% for message in messages %}}{{% if message['role'] == 'user' %}}{USER} {{% endif %}}"
    f"{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{IMAGE}\n"
    f"{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}"
    f"{{% if message['role'] == 'assistant' %}}{EOS}{{% elif not loop.last %}} {ASSISTANT} {{% endif %}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}} {ASSISTANT}{{% endif %}}"
)


def save_student(
    model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, *, centre: float = 225.0, spread: float = 60.0
) -> None:
    """Write a prepared student with its scales, tokenizer, image processor and chat template; one that is there stays.

    Args:
        model: the student.
        tokenizer: of the student.
        folder: to write.
        centre: brightness that was 0 in its input.
        spread: brightness that was 1, from there.
    """
    if (folder / SCALES_FILE).is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted writing
    vision = model.config.vision_config
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    size = {"height": vision.image_size, "width": vision.image_size}
    images = kind(
        size=size,
        do_center_crop=False,
        do_rescale=False,
        image_mean=[centre] * 3,
        image_std=[spread] * 3,
    )
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=TEMPLATE,
    )
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    processor.save_pretrained(part)
    save_qat(model, part)
    part.replace(folder)
