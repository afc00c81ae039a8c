"""When a VisualTokenTap sees a forward, what it leaves behind (nothing), and what it refuses."""

import warnings
from contextlib import ExitStack

import pytest
import tiny_models
import torch
from torch import nn

from gracekit.vlm import VisualTokenTap

families = pytest.mark.parametrize(("build", "batch_for"), tiny_models.PAIRS.values(), ids=tiny_models.PAIRS)


@pytest.fixture(scope="module")
def llava():
    return tiny_models.tiny_llava()


def at_images(model, batch, hidden):
    return hidden[batch["input_ids"] == model.config.image_token_id]


def traces(model):
    """Whatever an open tap leaves on a model: hooks, and instance attributes that hide methods."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return hooks, [m for m in model.modules() if {"get_image_features", "get_video_features"} & set(vars(m))]


def test_a_block_that_runs_again_in_the_backward_pass_leaves_no_tensor_behind():
    model = tiny_models.tiny_llava().train()
    tiny_models.checkpoint_activations(model, reentrant=True, hooks_inside=True)
    batch, calls = tiny_models.llava_batch(model), []
    model.get_decoder().layers[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    with VisualTokenTap(model) as tap:
        out = model(**batch, use_cache=False)
        tap.tokens(batch)
        out.logits.sum().backward()
        assert len(calls) == 2
        assert not [value for value in vars(tap).values() if isinstance(value, torch.Tensor)]


def test_of_several_forwards_the_latest_is_read_and_only_once(llava):
    first, second = tiny_models.llava_batch(llava, ["tI"]), tiny_models.llava_batch(llava, ["tIt", "tIt"])
    with VisualTokenTap(llava) as tap:
        llava(**first)
        llava(**second)
        assert tap.tokens(second)[1] == [9, 9]
        with pytest.raises(RuntimeError, match="no forward of the model was seen"):
            tap.tokens(second)
        llava(**first)
        assert tap.tokens(first)[1] == [9]


def test_tokens_may_be_read_after_the_block_but_later_forwards_are_not_seen(llava):
    batch = tiny_models.llava_batch(llava)
    with VisualTokenTap(llava) as tap:
        llava(**batch)
    assert tap.tokens(batch)[1] == [9, 9, 9]
    llava(**batch)
    with pytest.raises(RuntimeError, match="no forward of the model was seen"):
        tap.tokens(batch)


def test_features_computed_outside_a_forward_are_not_counted(llava):
    batch = tiny_models.llava_batch(llava)
    with VisualTokenTap(llava) as tap:
        llava.get_image_features(batch["pixel_values"])
        llava(**batch)
        llava.get_image_features(batch["pixel_values"])
        assert tap.tokens(batch)[1] == [9, 9, 9]


def test_a_forward_that_fails_leaves_nothing_to_read(llava):
    batch = tiny_models.llava_batch(llava)

    def fail(*_):
        raise ArithmeticError

    with VisualTokenTap(llava) as tap:
        llava(**batch)
        hook = llava.get_decoder().layers[-1].register_forward_hook(fail)
        with pytest.raises(ArithmeticError):
            llava(**batch)
        hook.remove()
        with pytest.raises(RuntimeError, match="no forward of the model was seen"):
            tap.tokens(batch)
        llava(**batch)
        assert tap.tokens(batch)[1] == [9, 9, 9]


def test_a_forward_that_fails_before_the_decoder_leaves_nothing_to_read(llava):
    batch = tiny_models.llava_batch(llava)
    with VisualTokenTap(llava) as tap:
        llava(**batch)
        with pytest.raises(Exception, match="Image features and image tokens do not match"):
            llava(**{**batch, "pixel_values": batch["pixel_values"][:1]})
        with pytest.raises(RuntimeError, match="no forward of the model was seen"):
            tap.tokens(batch)


def test_a_batch_that_does_not_fit_may_be_corrected(llava):
    batch = tiny_models.llava_batch(llava)
    with VisualTokenTap(llava) as tap:
        llava(**batch)
        with pytest.raises(ValueError, match="are they of the same forward"):
            tap.tokens({"input_ids": batch["input_ids"][:1]})
        assert tap.tokens(batch)[1] == [9, 9, 9]


def test_nothing_of_the_tap_stays_on_the_model(llava):
    batch = tiny_models.llava_batch(llava)
    llava(**batch, output_hidden_states=True)  # transformers installs hooks of its own on first use
    before, method = traces(llava), type(llava.model).get_image_features
    with VisualTokenTap(llava):
        assert traces(llava) != before
        assert type(llava.model).get_image_features is method
    assert traces(llava) == before
    with pytest.raises(ValueError, match="exactly one of input_ids"), VisualTokenTap(llava):
        llava()
    assert traces(llava) == before


def test_taps_of_one_model_may_be_left_in_any_order(llava):
    batch = tiny_models.llava_batch(llava)
    before = traces(llava)
    first, second = VisualTokenTap(llava, layer=-2), VisualTokenTap(llava, layer=-3)
    first.__enter__()
    second.__enter__()
    out = llava(**batch, output_hidden_states=True)
    for tap, layer in ((first, -2), (second, -3)):
        tokens, lengths = tap.tokens(batch)
        assert torch.equal(tokens, at_images(llava, batch, out.hidden_states[layer]))
        assert lengths == [9, 9, 9]
    first.__exit__(None, None, None)
    llava(**batch)
    assert second.tokens(batch)[1] == [9, 9, 9]
    second.__exit__(None, None, None)
    assert traces(llava) == before


def test_an_instance_attribute_that_hid_the_method_before_is_put_back(llava):
    own = llava.model.get_image_features
    llava.model.get_image_features = own
    try:
        with VisualTokenTap(llava):
            assert vars(llava.model)["get_image_features"] is not own
        assert vars(llava.model)["get_image_features"] is own
    finally:
        del llava.model.get_image_features


def test_a_model_compiled_inside_the_tap_is_seen(llava):
    batch = tiny_models.llava_batch(llava, ["tIIt", "It"])
    with VisualTokenTap(llava) as tap, torch.no_grad():
        llava(**batch)
        expected = tap.tokens(batch)
        torch.compile(llava, backend="eager")(**batch)
        tokens, lengths = tap.tokens(batch)
    torch.testing.assert_close(tokens, expected[0])
    assert lengths == expected[1] == [9, 9, 9]
    torch.compiler.reset()


def test_a_model_compiled_before_the_tap_is_refused(llava):
    batch = tiny_models.llava_batch(llava, ["tIIt", "It"])
    compiled = torch.compile(llava, backend="eager")
    with torch.no_grad():
        compiled(**batch)
        with VisualTokenTap(llava) as tap:
            compiled(**batch)
            with pytest.raises(RuntimeError, match=r"enter the tap before torch\.compile first runs the model"):
                tap.tokens(batch)
    torch.compiler.reset()


def test_a_batch_of_another_forward_is_refused(llava):
    batch = tiny_models.llava_batch(llava, ["tIt", "tIt"])
    with VisualTokenTap(llava) as tap:
        llava(**batch)
        with pytest.raises(ValueError, match=r"got input_ids of shape \(2, 10\) and hidden of shape \(2, 11, 32\)"):
            tap.tokens({"input_ids": batch["input_ids"][:, :-1]})
        llava(**batch)
        with pytest.raises(ValueError, match="2 lengths with sum 18 for 0 placeholders"):
            tap.tokens({"input_ids": torch.ones_like(batch["input_ids"])})


def test_generation_leaves_the_last_decoding_step_which_does_not_fit_the_prompt(llava):
    batch = tiny_models.llava_batch(llava, ["tIt"])
    with VisualTokenTap(llava) as tap:
        llava.generate(**batch, max_new_tokens=2, do_sample=False, pad_token_id=0)
        with pytest.raises(ValueError, match="are they of the same forward"):
            tap.tokens(batch)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"pixel_values": 1}, ValueError, r"batch must have a tensor input_ids, got keys \['pixel_values'\]"),
        ({"input_ids": [[1, 2]]}, ValueError, "batch must have a tensor input_ids"),
        (torch.ones(1, 2), TypeError, "batch must be a mapping with input_ids, got Tensor"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long)}, RuntimeError, "no forward of the model was seen"),
    ],
)
def test_a_bad_batch_is_named(llava, batch, error, message):
    with VisualTokenTap(llava) as tap, pytest.raises(error, match=message):
        tap.tokens(batch)


@pytest.mark.parametrize("layer", [3, -4, 100])
def test_a_layer_out_of_range_is_named(llava, layer):
    with pytest.raises(ValueError, match=f"layer must be at least -3 and at most 2, got layer={layer}"):
        VisualTokenTap(llava, layer=layer)


def test_models_that_cannot_be_tapped_are_refused(llava):
    with pytest.raises(ValueError, match=r"model must have a decoder: get_decoder\(\) .* got Linear without one"):
        VisualTokenTap(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="config has an integer image_token_id, got LlamaModel without one"):
        VisualTokenTap(llava.get_decoder())
    with pytest.raises(TypeError, match="model must be a torch"):
        VisualTokenTap("llava")
    with pytest.raises(TypeError, match="layer must be an integer"):
        VisualTokenTap(llava, layer="-2")


def test_taps_open_with_an_exit_stack_and_reopen(llava):
    batch = tiny_models.llava_batch(llava)
    tap = VisualTokenTap(llava)
    for _ in range(2):
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("error")
            stack.enter_context(tap)
            llava(**batch)
            assert tap.tokens(batch)[1] == [9, 9, 9]
    with tap, pytest.raises(RuntimeError, match="already entered"):
        tap.__enter__()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@families
def test_reading_the_tokens_does_not_synchronise_with_the_device(build, batch_for):
    model = build().cuda()
    batch = {name: value.cuda() for name, value in batch_for(model).items()}
    with VisualTokenTap(model) as tap:
        model(**batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            tap.tokens(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
