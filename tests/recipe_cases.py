"""A teacher small enough to be made in a test, and the arguments of a recipe that takes seconds."""

import json

import torch

from gracekit.recipe.data import build_tokenizer, load_easy_vqa
from gracekit.recipe.models import ModelSize, build_model

TINY = ModelSize(width=32, vision_layers=1, text_layers=2, heads=2, patch_size=16)


def easy_vqa_tokenizer():
    questions = load_easy_vqa("train", 1000).questions
    return build_tokenizer(text for question in questions for text in (question.text, question.answer))


def save_tiny_teacher(folder):
    tokenizer = easy_vqa_tokenizer()
    model = build_model(ModelSize(width=32, vision_layers=1, text_layers=2, heads=2), tokenizer, seed=3)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {"accuracy": 0.5, "questions": 10, "parameters": 1, "config": {"seed": 3, "steps": 2}}
    (folder / "training.json").write_text(json.dumps(record))
    return str(folder)


def tiny_arguments(teacher, output, *more):
    options = {
        "teacher": teacher, "output": output, "device": "cpu", "steps": 8, "finish_steps": 4, "batch_size": 4,
        "train_images": 16, "test_images": 4,
    }  # fmt: skip
    return [part for name, value in options.items() for part in (f"--{name}", str(value))] + list(more)
