"""Answers that a model generates, one question after its image at a time, and how many are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from gracekit.recipe.data import Question, VqaSplit, encode, prefix_text, question_text


@torch.inference_mode()
def generate_answers(
    model: LlavaForConditionalGeneration,
    split: VqaSplit,
    tokenizer: PreTrainedTokenizerFast,
    *,
    image_tokens: int,
    batch_size: int = 256,
    max_new_tokens: int = 3,
    advance: Callable[[int], Any] = lambda count: None,
) -> list[str]:
    """Return the model's answer to every question of a split, by greedy ``model.generate``.

    Args:
        model: in the dtype and with the kernels that are to be judged.
        split: images and questions.
        tokenizer: the model's; pads on the left.
        image_tokens: visual tokens of one image.
        batch_size: questions at a time.
        max_new_tokens: an answer's end included.
        advance: called with the number of questions done, for a progress bar.
    """
    model.eval()
    parameter = next(model.parameters())
    shown = split.shown
    asked = [prefix_text(image_tokens, len(shown[q.image])) + question_text(q.text) for q in split.questions]
    prompts = encode(tokenizer, asked, open_vocabulary=split.open_vocabulary)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers: list[str] = [""] * len(prompts)
    # Questions of one length go together: no padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [prompts[index] for index in chosen]}, return_tensors="pt")
        images = [image for index in chosen for image in shown[split.questions[index].image]]
        pixels = {"pixel_values": split.pixels(images).to(parameter.device, parameter.dtype)} if images else {}
        generated = model.generate(
            input_ids=batch["input_ids"].to(parameter.device),
            attention_mask=batch["attention_mask"].to(parameter.device),
            **pixels,
            generation_config=settings,
        )
        texts = tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text.strip()
        advance(len(chosen))
    return answers


def accuracy(answers: Sequence[str], questions: Sequence[Question]) -> float:
    """Return the share of answers in [0, 1] that match exactly."""
    return sum(given == question.answer for given, question in zip(answers, questions, strict=True)) / len(questions)
