"""Every family in the settings people train in: a wider teacher beside it, low-rank adapters, torch.compile."""

import os
import re
import warnings

import pytest
import torch
from accelerate import dispatch_model
from tiny_families import FAMILIES, IMAGE

from gracekit import RelationalCKA, gated_dkd, shift_labels
from gracekit.vlm import VisualTokenPair, VisualTokenTap, language_linears

every_family = pytest.mark.parametrize("name", FAMILIES)
SAMPLES = ["ttIt", "tIIt", "tttt"]
TEACHERS_IMAGE = 140
COMPILED_EVERY_TIME = ("internvl", "qwen3_vl")  # features by tile; features added between blocks


def bigger_teacher(family):
    """Wider, deeper, with a padded vocabulary and another placeholder id."""
    teacher = family.build(width=64, layers=8, seed=1, vocab_size=160).requires_grad_(False)
    for config in {id(m.config): m.config for m in teacher.modules() if hasattr(m, "config")}.values():
        if getattr(config, "image_token_id", None) == IMAGE:
            config.image_token_id = TEACHERS_IMAGE
    return teacher


@every_family
@pytest.mark.support("Teacher of another size")
def test_a_student_learns_from_a_teacher_of_other_width_depth_ids_and_padding(name):
    """The pair object, RelationalCKA and gated_dkd together, down to gradients of the first block and of what is before it."""
    family = FAMILIES[name]
    student, teacher = family.build().train(), bigger_teacher(family)
    batch = family.batch(SAMPLES)
    ids = batch["input_ids"]
    taught = {**batch, "input_ids": ids.masked_fill(ids == IMAGE, TEACHERS_IMAGE)}
    labels = shift_labels(ids.masked_fill((batch["attention_mask"] == 0) | (ids >= IMAGE), -100))
    with VisualTokenPair(student, teacher) as pair:
        out = student(**batch, use_cache=False)
        with torch.no_grad():
            reference = teacher(**taught)
        tokens = pair.tokens(batch, taught)
    assert tokens.lengths == family.lengths(SAMPLES)
    assert (tokens.student.shape[1], tokens.teacher.shape[1]) == (32, 64)
    relational = RelationalCKA()(*tokens)
    assert 0 < relational < 1
    (relational + gated_dkd(out.logits, reference.logits, labels, vocab_size=128)).backward()
    gradients = {key: p.grad for key, p in student.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    first = next(key for key in language_linears_quietly(student) if f"{key}.weight" in gradients)
    assert gradients[f"{first}.weight"].abs().sum() > 0
    pictures = [key for key in gradients if not re.search("language_model|text_model|lm_head", key)]
    assert any(gradients[key].abs().sum() > 0 for key in pictures)


def language_linears_quietly(model):
    with warnings.catch_warnings(action="ignore"):  # of experts that stay unquantised
        return language_linears(model)


def tapped(model, batch):
    with VisualTokenTap(model) as tap:
        model(**batch, use_cache=False)
        return tap.tokens(batch)


@every_family
@pytest.mark.support("LoRA")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_adapters_of_peft_are_trained_through_the_tap_and_not_quantised(name):
    peft = pytest.importorskip("peft")
    family, batch = FAMILIES[name], FAMILIES[name].batch(SAMPLES)
    model = family.build()
    with torch.no_grad():
        expected, lengths = tapped(model, batch)
    plain = language_linears_quietly(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(plain)))
    tokens, adapted_lengths = tapped(adapted, batch)
    assert torch.equal(tokens, expected)  # a fresh adapter adds 0
    assert adapted_lengths == lengths
    trained = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in key for key in trained)
    own = adapted(**batch, use_cache=False, output_hidden_states=True).hidden_states[-2][batch["input_ids"] == IMAGE]
    of_tap, of_states = (
        torch.autograd.grad(seen.square().mean(), list(trained.values()), allow_unused=True) for seen in (tokens, own)
    )
    assert sum(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in of_tap) > 1
    for got, wanted in zip(of_tap, of_states, strict=True):
        torch.testing.assert_close(got, wanted)
    linears = language_linears_quietly(adapted)
    assert [linear.weight.shape for linear in linears.values()] == [linear.weight.shape for linear in plain.values()]
    assert all(".base_layer" in key for key in linears)


@every_family
@pytest.mark.support("torch.compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo asks every tensor
def test_a_model_compiled_inside_the_tap_gives_the_same_tokens_and_gradients(name, request):
    often = name in COMPILED_EVERY_TIME or os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
    if not often and request.config.getoption("--support-table") is None:
        pytest.skip("tracing takes seconds: nightly, and for the table of supported families")
    family, batch = FAMILIES[name], FAMILIES[name].batch(SAMPLES)
    model = family.build(layers=2)
    torch.compiler.reset()
    found = []
    with VisualTokenTap(model) as tap:
        for call in (model, torch.compile(model, backend="eager")):
            logits = call(**batch, use_cache=False).logits
            tokens, lengths = tap.tokens(batch)
            model.zero_grad()
            (logits.square().mean() + tokens.square().mean()).backward()
            found.append((tokens.detach(), lengths, {key: p.grad for key, p in model.named_parameters()}))
    torch.compiler.reset()
    (expected, lengths, gradients), (tokens, compiled_lengths, compiled_gradients) = found
    torch.testing.assert_close(tokens, expected)
    assert compiled_lengths == lengths
    for key, wanted in gradients.items():
        torch.testing.assert_close(compiled_gradients[key], wanted, msg=key)


@every_family
@pytest.mark.support("Dispatch")
def test_gradients_under_accelerates_dispatch_are_the_same(name):
    family, batch = FAMILIES[name], FAMILIES[name].batch(SAMPLES)
    found = []
    for model in (family.build(), dispatch_model(family.build(), {"": "cpu"}, force_hooks=True)):
        tapped(model, batch)[0].square().mean().backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    expected, got = found
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], wanted) for key, wanted in expected.items())
