"""Every family that transformers ships and people train obeys one contract, without code of its own in the library."""

import functools
import re
import warnings

import pytest
import tiny_models
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from tiny_families import FAMILIES, IMAGE, VIDEO
from tolerances import GRADIENT

from gracekit.vlm import VisualTokenTap, coverage, language_linears

every_family = pytest.mark.parametrize("name", FAMILIES)
with_video = pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.video])
PARTED, ADJACENT, NONE, VIDEOS = ["ttIt", "tItIt", "tttt"], ["tIIt", "t", "IIIt"], ["ttt", "t"], ["tVtIt", "ItV"]


@functools.cache
def model_of(name):
    return FAMILIES[name].build()


def tapped(model, batch, layer=-2, **more):
    """Tokens and lengths; a warning (lengths not seen) is an error throughout this suite."""
    with VisualTokenTap(model, layer=layer) as tap:
        out = model(**batch, **more)
        return out, *tap.tokens(batch)


def visual(hidden, batch):
    ids = batch["input_ids"]
    return torch.cat([hidden[ids == IMAGE], hidden[ids == VIDEO]])


@every_family
@pytest.mark.support("Tokens by image")
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("samples", [PARTED, ADJACENT, NONE], ids=["parted", "adjacent", "none"])
def test_tapped_tokens_are_the_penultimate_hidden_states_and_lengths_are_by_image(name, samples, padding):
    family, model = FAMILIES[name], model_of(name)
    batch = family.batch(samples, padding=padding)
    with torch.no_grad():
        out, tokens, lengths = tapped(model, batch, output_hidden_states=True)
    assert torch.equal(tokens, visual(out.hidden_states[-2], batch))
    assert lengths == family.lengths(samples)


@with_video
@pytest.mark.support("Video")
def test_videos_follow_the_images(name):
    family, model = FAMILIES[name], model_of(name)
    batch = family.batch(VIDEOS)
    with torch.no_grad():
        out, tokens, lengths = tapped(model, batch, output_hidden_states=True)
    assert torch.equal(tokens, visual(out.hidden_states[-2], batch))
    assert lengths == family.lengths(VIDEOS)


def gradients(model, batch, *, tap):
    model.zero_grad()
    if tap:
        out, tokens, _ = tapped(model, batch, use_cache=False)
    else:
        out = model(**batch, use_cache=False, output_hidden_states=True)
        tokens = visual(out.hidden_states[-2], batch)
    (out.logits.square().mean() + tokens.square().mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_family
@pytest.mark.support("Activation checkpointing")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_gradients_are_the_same_with_checkpointing(name, reentrant):
    family = FAMILIES[name]
    model, batch = family.build().train(), family.batch(PARTED)
    expected = gradients(model, batch, tap=False)
    tiny_models.checkpoint_activations(model, reentrant=reentrant)
    got = gradients(model, batch, tap=True)
    assert got.keys() == expected.keys()
    tolerance = GRADIENT[torch.float32]
    for key, wanted in expected.items():
        # Sums are ordered differently, so a small element beside large ones is off by their rounding.
        atol = tolerance["atol"] * max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(got[key], wanted, rtol=tolerance["rtol"], atol=atol, msg=key)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
def test_features_added_between_blocks_belong_to_the_tapped_tokens(name):
    """hidden_states records a block's output before deepstack features are added; the next block sees them."""
    family = FAMILIES[name]
    model, batch = family.build(layers=3), family.batch(PARTED)
    with torch.no_grad():
        out, tokens, _ = tapped(model, batch, output_hidden_states=True)
        features = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"], return_dict=True)
    added = features.deepstack_features[1]
    added = torch.cat(added) if isinstance(added, list | tuple) else added
    before = visual(out.hidden_states[-2], batch)
    assert added.abs().max() > 0
    torch.testing.assert_close(tokens, before + added)


@every_family
@pytest.mark.support("Quantised share of the blocks")
def test_the_decoders_projections_are_quantised_and_the_rest_is_reported(name, record_property):
    family, model = FAMILIES[name], model_of(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        linears = language_linears(model)
    assert {full.rpartition(".")[2] for full in linears} == set(family.quantised)
    assert all(re.search(r"\b(language_model|text_model)\.layers\.\d+\.", full) for full in linears)
    report = coverage(model)
    assert report.share >= family.share
    record_property("support", f"{report.share:.0%}")
    assert bool(caught) == (report.share < 0.95)
    if caught:
        assert "experts" in str(caught[0].message)


@every_family
@pytest.mark.support("Offload")
def test_modules_offloaded_by_accelerate_are_tapped_all_the_same(name):
    if name == "idefics3":
        pytest.skip("moves its input to model.device, which is meta while weights are offloaded")
    family, batch = FAMILIES[name], FAMILIES[name].batch(PARTED)
    model = family.build()
    with torch.no_grad():
        _, expected, lengths = tapped(model, batch)
        cpu_offload(model, execution_device=torch.device("cpu"))
        _, tokens, offloaded_lengths = tapped(model, batch)
    remove_hook_from_submodules(model)
    assert torch.equal(tokens, expected)
    assert offloaded_lengths == lengths
