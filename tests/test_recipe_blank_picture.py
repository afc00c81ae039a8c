"""A blank picture lets a batch without pictures use every parameter that one with pictures uses, and changes no value."""

import pytest
import torch
from conversation_cases import save_pair
from tiny_families import FAMILIES

from gracekit.recipe.blank_picture import BlankPicture, blank_picture, has_pictures
from gracekit.recipe.processors import load_processor
from gracekit.vlm import VisualTokenTap


def trained(model, batch, *contexts):
    """Names of the parameters that have a gradient, and the logits."""
    model.zero_grad()
    for context in contexts:
        context.__enter__()
    try:
        logits = model(**batch, use_cache=False).logits
    finally:
        for context in reversed(contexts):
            context.__exit__(None, None, None)
    logits.float().square().mean().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}, logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_blank_picture_trains_what_a_picture_trains_and_changes_nothing(family):
    case = FAMILIES[family]
    model = case.build()
    seen, blank = case.batch(["tIt"]), case.batch(["ttt"])
    ids = set(blank)
    given = {name: value for name, value in seen.items() if name not in ids}
    picture = BlankPicture(model, given)
    expected, _ = trained(model, seen)
    alone, plain = trained(model, blank)
    assert alone < expected
    found, logits = trained(model, blank, picture)
    assert found == expected
    assert torch.equal(logits, plain)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for n, p in model.named_parameters() if n in expected - alone)


def test_a_tap_beside_it_sees_no_picture():
    case = FAMILIES["llava"]
    model, batch = case.build(), case.batch(["ttt"])
    picture = BlankPicture(model, case.pixels(["I"]))
    with VisualTokenTap(model) as tap, picture:
        model(**batch)
        tokens, lengths = tap.tokens(batch, lengths=[])
    assert (tokens.shape[0], lengths) == (0, [])
    assert not has_pictures(batch)
    assert has_pictures(case.batch(["tI"]))


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "qwen3_vl"])
def test_a_processor_gives_the_blank_picture_of_its_model(tmp_path, family):
    from transformers import AutoModelForImageTextToText

    folder = save_pair(tmp_path / family, family)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    picture = BlankPicture(model, blank_picture(load_processor(folder)))
    found, _ = trained(model, {"input_ids": torch.tensor([[1, 2, 3]])}, picture)
    alone, _ = trained(model, {"input_ids": torch.tensor([[1, 2, 3]])})
    assert alone < found


def test_a_model_without_features_of_pictures_is_refused():
    with pytest.raises(ValueError, match="get_image_features"):
        BlankPicture(torch.nn.Linear(2, 2), {"pixel_values": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"pixel_values of a picture, got \['pixels'\]"):
        BlankPicture(FAMILIES["llava"].build(), {"pixels": torch.zeros(1)})
