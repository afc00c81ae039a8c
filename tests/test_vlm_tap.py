"""VisualTokenTap against transformers' own ``output_hidden_states=True``, bit for bit: values, gradients, lengths."""

import pytest
import tiny_models
import torch
from tolerances import GRADIENT

from gracekit.vlm import VisualTokenTap

families = pytest.mark.parametrize(("build", "batch_for"), tiny_models.PAIRS.values(), ids=tiny_models.PAIRS)


@pytest.fixture(scope="module")
def llava():
    return tiny_models.tiny_llava()


def at_images(model, batch, hidden):
    return hidden[batch["input_ids"] == model.config.image_token_id]


@families
@pytest.mark.parametrize("padding", ["left", "right"])
def test_tapped_tokens_are_the_hidden_states_at_the_image_positions(build, batch_for, padding):
    model = build(layers=4)
    batch = batch_for(model, padding=padding)
    for layer in (-4, -3, -2, 0, 1, 2):
        with VisualTokenTap(model, layer=layer) as tap:
            out = model(**batch, output_hidden_states=True)
            tokens, lengths = tap.tokens(batch)
        recorded = out.hidden_states[layer if layer < 0 else layer + 1]
        assert torch.equal(tokens, at_images(model, batch, recorded))
        assert len(lengths) == 3


@families
def test_the_last_layer_is_tapped_before_the_final_norm(build, batch_for):
    model = build()
    batch = batch_for(model)
    with VisualTokenTap(model, layer=-1) as tap:
        out = model(**batch, output_hidden_states=True)
        tokens, _ = tap.tokens(batch)
    normed = model.get_decoder().norm(tokens)
    torch.testing.assert_close(normed, at_images(model, batch, out.hidden_states[-1]))
    assert not torch.equal(tokens, normed)


@families
def test_watching_a_forward_does_not_change_its_output(build, batch_for):
    model = build()
    batch = batch_for(model)
    before = model(**batch).logits
    with VisualTokenTap(model):
        assert torch.equal(model(**batch).logits, before)


def parameter_gradients(model, batch, tapped):
    """Gradients of a loss on logits and penultimate visual tokens, by the tap or by the model's own hidden states."""
    model.zero_grad()
    with VisualTokenTap(model) as tap:
        out = model(**batch, output_hidden_states=not tapped, use_cache=False)
        tokens = tap.tokens(batch)[0] if tapped else at_images(model, batch, out.hidden_states[-2])
        (out.logits.square().mean() + tokens.square().mean()).backward()
        if tapped:  # a block that ran again in the backward pass was not captured
            with pytest.raises(RuntimeError, match="no forward of the model was seen"):
                tap.tokens(batch)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CHECKPOINTING = {
    "plain": None,
    "non_reentrant": {"reentrant": False},
    "reentrant": {"reentrant": True},
    "non_reentrant_with_hooks_inside": {"reentrant": False, "hooks_inside": True},
    "reentrant_with_hooks_inside": {"reentrant": True, "hooks_inside": True},
}


@families
@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING)
def test_gradients_through_the_tap_are_those_of_the_models_own_hidden_states(build, batch_for, checkpointing):
    """Without checkpointing and with every variant of it, re-entrant ones up to the order in which gradients are summed."""
    model = build().train()
    batch = batch_for(model)
    expected = parameter_gradients(model, batch, tapped=False)
    if checkpointing is not None:
        tiny_models.checkpoint_activations(model, **checkpointing)
    got = parameter_gradients(model, batch, tapped=True)
    assert got.keys() == expected.keys()
    assert len(got) > 30
    exact = not (checkpointing or {}).get("reentrant")
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], **({"rtol": 0, "atol": 0} if exact else GRADIENT[torch.float32])
        )


def test_the_tokens_alone_give_the_vision_tower_and_early_blocks_their_gradient(llava):
    llava.zero_grad()
    batch = tiny_models.llava_batch(llava)
    with VisualTokenTap(llava) as tap:
        llava(**batch)
        tap.tokens(batch)[0].square().sum().backward()
    layers = llava.get_decoder().layers
    assert llava.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert layers[1].mlp.up_proj.weight.grad.abs().sum() > 0
    assert layers[2].mlp.up_proj.weight.grad is None
    llava.zero_grad()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_adjacent_images_of_one_sample_have_lengths_of_their_own(llava, padding):
    batch = tiny_models.llava_batch(llava, ["tIIt", "t", "IIIt"], padding=padding)
    with VisualTokenTap(llava) as tap:
        llava(**batch)
        tokens, lengths = tap.tokens(batch)
    assert lengths == [tiny_models.LLAVA_TOKENS] * 5
    assert len(tokens) == sum(lengths)


def test_images_of_different_sizes_have_the_lengths_of_their_grids():
    model = tiny_models.tiny_qwen2_vl()
    batch = tiny_models.qwen2_vl_batch(model, ["tIIt", "t", "It"])
    with VisualTokenTap(model) as tap:
        model(**batch)
        assert tap.tokens(batch)[1] == [4, 6, 8]


def test_videos_come_after_all_images_one_length_each():
    model = tiny_models.tiny_qwen2_vl()
    batch = tiny_models.qwen2_vl_batch(model, ["tVtIt", "ItV"])
    with VisualTokenTap(model) as tap:
        out = model(**batch, output_hidden_states=True)
        tokens, lengths = tap.tokens(batch)
    hidden = out.hidden_states[-2]
    videos = hidden[batch["input_ids"] == model.config.video_token_id]
    assert torch.equal(tokens, torch.cat([at_images(model, batch, hidden), videos]))
    assert lengths == [4, 6, 8, 8]


@families
def test_a_batch_without_images_has_no_tokens_and_no_lengths(build, batch_for):
    model = build()
    batch = batch_for(model, ["ttt", "tt"])
    with VisualTokenTap(model) as tap:
        model(**batch)
        tokens, lengths = tap.tokens(batch)
    assert tokens.shape == (0, 32)
    assert lengths == []


def test_precomputed_embeddings_fall_back_to_runs_with_a_warning(llava):
    """Nothing shows where the first two images of this batch part, so they merge, and the tap says so."""
    batch = tiny_models.llava_batch(llava, ["tIIt", "tI"])
    embeddings = llava.get_input_embeddings()(batch["input_ids"])
    with VisualTokenTap(llava) as tap:
        llava(inputs_embeds=embeddings, attention_mask=batch["attention_mask"])
        with pytest.warns(UserWarning, match="each run of placeholders counts as one image") as caught:
            tokens, lengths = tap.tokens(batch)
    assert lengths == [18, 9]
    assert len(tokens) == 27
    assert caught[0].filename == __file__


def test_lengths_that_are_given_part_the_images_of_precomputed_embeddings(llava):
    batch = tiny_models.llava_batch(llava, ["tIIt", "tI"])
    embeddings = llava.get_input_embeddings()(batch["input_ids"])
    with VisualTokenTap(llava) as tap:
        llava(inputs_embeds=embeddings, attention_mask=batch["attention_mask"])
        tokens, lengths = tap.tokens(batch, lengths=[9, 9, 9])
    assert lengths == [9, 9, 9]
    assert len(tokens) == 27


def test_a_vision_tower_with_feature_methods_of_its_own_changes_nothing():
    """What the model scatters is the result of the outermost method, whatever runs inside it."""
    model = tiny_models.tiny_qwen2_vl()
    visual = model.model.visual

    class Tower(type(visual)):
        def get_image_features(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

        def forward(self, *args, **kwargs):
            return self.get_image_features(*args, **kwargs)

    visual.__class__ = Tower
    batch = tiny_models.qwen2_vl_batch(model, ["tItVt", "It"])
    with VisualTokenTap(model) as tap:
        model(**batch)
        assert tap.tokens(batch)[1] == [4, 6, 8]


def test_teacher_and_student_of_different_size_are_tapped_side_by_side(llava):
    teacher = tiny_models.tiny_llava(seed=1, width=48, layers=4, vocab_size=160, image_token_id=140)
    batch = tiny_models.llava_batch(llava, ["tIIt", "It", "tt"])
    taught = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == 120, 140)}
    with VisualTokenTap(llava) as student_tap, VisualTokenTap(teacher) as teacher_tap:
        llava(**batch)
        with torch.no_grad():
            teacher(**taught)
        tokens, lengths = student_tap.tokens(batch)
        teacher_tokens, teacher_lengths = teacher_tap.tokens(taught)
    assert lengths == teacher_lengths == [9, 9, 9]
    assert (tokens.shape, teacher_tokens.shape) == ((27, 32), (27, 48))
    assert not teacher_tokens.requires_grad
