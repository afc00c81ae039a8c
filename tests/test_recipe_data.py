"""Packed sequences give what separate ones give, and the teacher's kept outputs are its own."""

import pytest
import torch
from recipe_cases import TINY, easy_vqa_tokenizer

from gracekit.recipe.data import (
    IGNORE_INDEX,
    PackedVqa,
    Question,
    build_tokenizer,
    encode,
    load_easy_vqa,
    pixel_values,
    prefix_text,
    question_text,
)
from gracekit.recipe.models import build_model, teacher_outputs
from gracekit.vlm import VisualTokenTap


@pytest.fixture(scope="module")
def tokenizer():
    return easy_vqa_tokenizer()


@pytest.fixture(scope="module")
def split():
    return load_easy_vqa("train", 12)


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(TINY, tokenizer, seed=0).eval()


def separate_logits(model, tokenizer, split, question):
    """Logits of one question alone with its image, from the token that predicts the answer on."""
    asked, answer = encode(tokenizer, [prefix_text(TINY.image_tokens) + question_text(question.text), question.answer])
    ids = torch.tensor([[*asked, *answer, tokenizer.eos_token_id]])
    images = pixel_values(split.images[question.image : question.image + 1])
    return model(input_ids=ids, pixel_values=images).logits[0, len(asked) - 1 : -1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_questions_have_the_logits_of_separate_samples(tokenizer, split, attention):
    model = build_model(TINY, tokenizer, seed=0).eval()
    model.set_attn_implementation(attention)
    packed = PackedVqa(split, tokenizer, image_tokens=TINY.image_tokens)
    batch = packed.collate(range(len(packed)))
    labels = batch.pop("labels")
    found = model(**batch).logits[:, :-1][labels[:, 1:] != IGNORE_INDEX]
    expected = torch.cat([separate_logits(model, tokenizer, split, question) for question in split.questions])
    order = packed.supervised[packed.supervised >= 0]
    torch.testing.assert_close(found, expected[order], rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01


@torch.no_grad()
def test_kept_teacher_outputs_are_those_of_a_live_teacher(tokenizer, split, model):
    outputs = teacher_outputs(model, split, tokenizer, batch_size=5)
    packed = PackedVqa(split, tokenizer, image_tokens=TINY.image_tokens, questions_per_image=3, teacher=outputs)
    batch = packed.collate([7, 2, 11, 0])
    labels, logits, tokens = (batch.pop(name) for name in ("labels", "teacher_logits", "teacher_tokens"))
    with VisualTokenTap(model) as tap:
        live = model(**batch).logits[:, :-1][labels[:, 1:] != IGNORE_INDEX]
        live_tokens, lengths = tap.tokens(batch)
    # Kept in bfloat16: 2^-8 relative.
    torch.testing.assert_close(logits, live, rtol=8e-3, atol=1e-3)
    torch.testing.assert_close(tokens, live_tokens, rtol=8e-3, atol=1e-3)
    assert lengths == [TINY.image_tokens] * 4


def test_every_question_is_in_one_example_and_its_answer_is_what_is_supervised(tokenizer, split):
    packed = PackedVqa(split, tokenizer, image_tokens=TINY.image_tokens, questions_per_image=4)
    seen = []
    for index in range(len(packed)):
        batch = packed.collate([index])
        labels = batch["labels"][0]
        target = labels[labels != IGNORE_INDEX]
        assert torch.equal(target, batch["input_ids"][0][labels != IGNORE_INDEX])
        answers = tokenizer.decode(target).split("</s>")[:-1]
        assert 1 <= len(answers) <= 4
        seen += [(int(packed.scene_index[index]), answer.strip()) for answer in answers]
    assert sorted(seen) == sorted((question.image, question.answer) for question in split.questions)


def test_answers_and_questions_survive_the_tokenizer(tokenizer, tmp_path):
    split = load_easy_vqa("test", 300)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    for text in {q.answer for q in split.questions} | {q.text.lower().replace("?", " ?") for q in split.questions}:
        for one in (tokenizer, again):
            assert one.decode(encode(one, [text])[0], skip_special_tokens=True) == text


def test_ids_do_not_depend_on_the_order_of_the_texts():
    texts = ["is there a circle?", "yes", "Blue"]
    assert build_tokenizer(texts).get_vocab() == build_tokenizer(texts[::-1]).get_vocab()


def test_an_unknown_word_is_an_error_that_shows_the_text(tokenizer):
    with pytest.raises(ValueError, match="is there a hexagon"):
        encode(tokenizer, ["is there a hexagon?"])


def test_an_image_with_many_questions_has_examples_of_nearly_equal_size(tokenizer):
    split = load_easy_vqa("train", 1)
    questions = [Question(0, "is there a circle?", "no")] * 9
    packed = PackedVqa(type(split)(split.images, questions), tokenizer, image_tokens=4, questions_per_image=4)
    sizes = [(row >= 0).sum().item() // 2 for row in packed.supervised]
    assert sorted(sizes) == [3, 3, 3]
