"""What the recipe leaves of a student reads a picture and a question as the recipe itself does."""

import torch
from PIL import Image
from recipe_cases import TINY, easy_vqa_tokenizer
from transformers import AutoProcessor, LlavaForConditionalGeneration

from gracekit.quant import LSQConfig, load_qat, prepare_qat
from gracekit.recipe.data import encode, load_easy_vqa, pixel_values, prefix_text, question_text
from gracekit.recipe.models import build_model
from gracekit.recipe.student_files import save_student


def test_a_saved_student_reads_and_computes_what_the_recipe_does(tmp_path):
    tokenizer = easy_vqa_tokenizer()
    model = build_model(TINY, tokenizer, seed=1)
    prepare_qat(model, LSQConfig(group_size=32))
    folder = tmp_path / "grace-int4-qat"
    save_student(model, tokenizer, folder)
    split = load_easy_vqa("test", 2)
    question = split.questions[0]
    (ids,) = encode(tokenizer, [prefix_text(TINY.image_tokens) + question_text(question.text)])
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Image.fromarray(split.images[question.image].permute(1, 2, 0).numpy())
    batch = processor(images=[picture], text=[text], return_tensors="pt", add_special_tokens=False)
    assert batch["input_ids"][0].tolist() == ids
    torch.testing.assert_close(batch["pixel_values"], pixel_values(split.images[[question.image]]))
    loaded = LlavaForConditionalGeneration.from_pretrained(folder)
    load_qat(loaded, folder)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_a_student_that_is_there_stays(tmp_path):
    tokenizer = easy_vqa_tokenizer()
    model = build_model(TINY, tokenizer, seed=1)
    prepare_qat(model, LSQConfig(group_size=32))
    save_student(model, tokenizer, tmp_path / "one")
    before = (tmp_path / "one" / "model.safetensors").stat().st_mtime_ns
    save_student(model, tokenizer, tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").stat().st_mtime_ns == before
    assert not list(tmp_path.glob("*.part"))
