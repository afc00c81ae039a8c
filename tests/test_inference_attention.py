"""Attention of a decode step through flex attention, against transformers' own and against a float64 softmax."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, normal, seeds
from test_inference_generate import BATCHES, NEW, built, theirs
from tiny_families import FAMILIES
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gracekit.inference import Generator
from gracekit.inference import attention as decode
from gracekit.inference.decoding import Decoding

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


class Layer(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def drawn(seed, rows, heads, groups, width, places, dtype=torch.float64):
    """Query of one token, keys, values, and a mask that hides some places and, in the first row, all but one."""
    query = normal(seed, rows, heads * groups, 1, width, dtype=dtype)
    key, value = (normal(seed + n, rows, heads, places, width, dtype=dtype) for n in (1, 2))
    hidden = torch.rand(rows, places, generator=generator(seed + 3)) < 0.5
    hidden[0] = True
    hidden[:, -1] = False
    mask = torch.zeros(rows, 1, 1, places, dtype=dtype).masked_fill(hidden[:, None, None], torch.finfo(dtype).min)
    return query, key, value, mask


sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 7]), st.sampled_from([16, 64, 80]))


@given(seeds, sizes, st.integers(1, 70))
def test_one_token_attends_as_the_softmax_says(seed, size, places):
    query, key, value, mask = drawn(seed, *size, places)
    groups, width = size[2:]
    out, weights = decode.attend(Layer(groups), query, key, value, mask, scaling=0.3)
    score = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * 0.3 + mask
    expected = (score.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2)
    assert weights is None
    assert out.shape == (size[0], 1, size[1] * groups, width)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    theirs, _ = sdpa_attention_forward(Layer(groups), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(out, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "changed",
    [{"length": 2}, {"width": 8}, {"mask": None}, {"mask": torch.bool}, {"dropout": 0.1}, {"position_bias": True}],
    ids=lambda changed: next(iter(changed)),
)
def test_what_flex_attention_is_not_asked_for_goes_to_transformers(changed, monkeypatch):
    called = []
    monkeypatch.setattr(decode, "sdpa_attention_forward", lambda *args, **options: called.append(options) or ("", None))
    monkeypatch.setattr(decode, "flex_attention", None)
    query, key, value, mask = drawn(0, 2, 2, 1, changed.get("width", 16), 5)
    query = query.expand(-1, -1, changed.get("length", 1), -1)
    if "mask" in changed:
        mask = None if changed["mask"] is None else mask == 0
    options = {name: changed[name] for name in ("dropout", "position_bias") if name in changed}
    assert decode.attend(Layer(1), query, key, value, mask, **options) == ("", None)
    assert called == [options]


@pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_step_with_it_gives_the_tokens_of_transformers(name, samples, monkeypatch):
    """As a compiled step does on CUDA, but run as it is."""
    model, batch = built(name, width=64), FAMILIES[name].batch(samples)
    calls = []
    flex = decode.flex_attention
    monkeypatch.setattr(decode, "flex_attention", lambda *args, **options: calls.append(1) or flex(*args, **options))
    step = Decoding.step
    monkeypatch.setattr(Decoding, "step", lambda self: vars(self).update(compiled=True) or step(self))
    made = Generator(model, len(samples), 64).generate(batch, max_new_tokens=NEW)
    assert torch.equal(made.sequences, theirs(model, batch))
    assert len(calls) == (NEW - 1) * len(model.get_decoder().layers)
    assert model.get_decoder().config._attn_implementation == "sdpa"


def test_a_model_of_another_implementation_keeps_it():
    model = built("llava")
    model.set_attn_implementation("eager")
    with decode.decode_attention(model.get_decoder().config):
        assert model.get_decoder().config._attn_implementation == "eager"
