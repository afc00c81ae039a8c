"""Our decode loop gives the tokens of transformers' generate, whatever the batch, the end, the settings and the weights' form."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from tiny_families import FAMILIES
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from gracekit.inference import Generator, decoding, generate
from gracekit.quant import LSQConfig, quantize_rtn

NEW = 12
NAMES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Of these some cache something else than keys and values of all tokens.
REFUSED = ("gemma3", "qwen3_5")
BATCHES = {
    "one": ["ttIt"],
    "several": ["ttIt", "tItIt", "ttttttt"],
    "no image": ["tttttt", "tt", "t"],
    "several images in one": ["tIIt"],
}


def built(name, *, seed=1, **size):
    model = FAMILIES[name].build(seed=seed, **size)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def theirs(model, batch, **options):
    return model.generate(**batch, **({"max_new_tokens": NEW, "do_sample": False} | options))


@pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_tokens_are_those_of_transformers(name, samples):
    model = built(name)
    if {"StaticSlidingWindowLayer"} & layer_kinds(model):
        model.get_decoder().config.sliding_window = None
    batch = FAMILIES[name].batch(samples)
    made = generate(model, batch, max_new_tokens=NEW)
    assert torch.equal(made.sequences, theirs(model, batch))
    assert made.new_tokens.tolist() == [NEW] * len(samples)
    assert made.peak_memory is None
    assert min(made.prefill_seconds, made.decode_seconds, made.tokens_per_second) > 0


def layer_kinds(model):
    from transformers import StaticCache

    return {type(layer).__name__ for layer in StaticCache(config=model.config, max_cache_len=16).layers}


@pytest.mark.parametrize("name", REFUSED)
def test_other_caches_are_refused_by_name(name):
    with pytest.raises(ValueError, match=r"must keep keys and values of all tokens in every layer, got \w+"):
        generate(built(name), FAMILIES[name].batch(["tttt"]), max_new_tokens=2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sync_every", [1, 5, 100])
def test_rows_end_where_theirs_end(name, sync_every):
    """Ends are tokens that some rows give early and others late, so that rows are padded and all are trimmed."""
    model, batch = built(name), FAMILIES[name].batch(BATCHES["several"])
    free = theirs(model, batch)[:, -NEW:]
    ends = sorted({int(free[0, 2]), int(free[1, 6]), int(free[2, 4])})
    model.generation_config.eos_token_id = ends
    made = Generator(model, 4, 100).generate(batch, max_new_tokens=NEW, sync_every=sync_every)
    expected = theirs(model, batch)
    assert torch.equal(made.sequences, expected)
    length = batch["input_ids"].shape[1]
    new = expected[:, length:]
    first = [next((i + 1 for i, token in enumerate(row) if token in ends), new.shape[1]) for row in new.tolist()]
    assert made.new_tokens.tolist() == first
    assert len(set(first)) > 1
    assert max(first) < NEW


def test_an_end_without_a_padding_token_is_padded_with_itself():
    model, batch = built("llava"), FAMILIES["llava"].batch(["tttt", "ttIt"])
    free = theirs(model, batch)[:, -NEW:]
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = int(free[0, 1]), None
    assert torch.equal(generate(model, batch, max_new_tokens=NEW).sequences, theirs(model, batch))


def test_one_new_token_needs_no_decode_step():
    model, batch = built("llava"), FAMILIES["llava"].batch(["ttIt"])
    made = generate(model, batch, max_new_tokens=1)
    assert torch.equal(made.sequences, theirs(model, batch, max_new_tokens=1))
    assert made.tokens_per_second == 0.0


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl"])
def test_sampled_tokens_are_those_of_transformers_with_the_same_random_numbers(name):
    model, batch = built(name), FAMILIES[name].batch(BATCHES["several"])
    chosen = GenerationConfig(
        do_sample=True, temperature=0.8, top_k=30, top_p=0.95, repetition_penalty=1.3, min_new_tokens=4, eos_token_id=[3, 9],
        max_new_tokens=NEW,
    )  # fmt: skip
    torch.manual_seed(5)
    expected = model.generate(**batch, generation_config=chosen)
    generator = torch.Generator().manual_seed(5)
    made = generate(model, batch, max_new_tokens=NEW, generation_config=chosen, generator=generator)
    assert torch.equal(made.sequences, expected)
    assert not torch.equal(expected, theirs(model, batch))


def test_settings_of_the_model_hold_in_greedy_search_too():
    model, batch = built("llava"), FAMILIES["llava"].batch(BATCHES["several"])
    plain = theirs(model, batch)
    model.generation_config.repetition_penalty = 1.5
    assert torch.equal(generate(model, batch, max_new_tokens=NEW).sequences, theirs(model, batch))
    assert not torch.equal(plain, theirs(model, batch))


class OddTokens(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.arange(0, scores.shape[1], 2), -torch.inf)


def test_a_forced_end_comes_where_theirs_does():
    model, batch = built("llava"), FAMILIES["llava"].batch(BATCHES["several"])
    made = generate(model, batch, max_new_tokens=4, generation_config=GenerationConfig(forced_eos_token_id=5))
    assert torch.equal(made.sequences, theirs(model, batch, max_new_tokens=4, forced_eos_token_id=5))
    assert made.sequences[:, -1].tolist() == [5, 5, 5]


def test_a_processor_of_ones_own_is_applied_last():
    model, batch = built("qwen2_vl"), FAMILIES["qwen2_vl"].batch(BATCHES["several"])
    processors = LogitsProcessorList([OddTokens()])
    made = generate(model, batch, max_new_tokens=NEW, logits_processor=processors)
    assert torch.equal(made.sequences, theirs(model, batch, logits_processor=processors))
    assert bool((made.sequences[:, -NEW:] % 2 == 1).all())


@pytest.mark.parametrize("name", NAMES)
def test_one_generator_serves_batch_after_batch(name):
    """Of its number of rows with the same cache, of another with a new one; nothing of an earlier prompt is left."""
    model = built(name)
    generator = Generator(model, 3, 80)
    for samples in (["ttIt", "tItIt", "ttttttt"], ["t", "tt", "tIt"], ["ttt"], ["tIt", "t", "tttt"]):
        batch = FAMILIES[name].batch(samples)
        assert torch.equal(generator.generate(batch, max_new_tokens=NEW).sequences, theirs(model, batch))
    layers, rows, places, head = 4, 3, 80, 8
    assert generator.cache_bytes == 2 * layers * rows * 2 * places * head * 4


def test_a_generator_made_in_inference_mode_can_be_used_outside_of_it():
    model, batch = built("llava"), FAMILIES["llava"].batch(["ttIt"])
    generator = Generator(model, 1, 60)
    with torch.inference_mode():
        first = generator.generate(batch, max_new_tokens=4).sequences
    second = generator.generate(batch, max_new_tokens=4).sequences
    assert torch.equal(first, second)
    second.zero_()


def test_eager_attention_gives_the_same_tokens():
    model, batch = built("qwen2_vl"), FAMILIES["qwen2_vl"].batch(BATCHES["several"])
    expected = theirs(model, batch)
    model.set_attn_implementation("eager")
    assert torch.equal(generate(model, batch, max_new_tokens=NEW).sequences, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("places", [48, 80])
@pytest.mark.parametrize("options", [{}, {"compile": True}, {"cuda_graph": False}], ids=["graph", "compiled", "plain"])
def test_tokens_on_cuda_are_those_of_transformers(options, places):
    model = built("llava", layers=1, width=64).cuda()
    batches = [FAMILIES["llava"].batch(samples) for samples in (BATCHES["several"], ["ttt", "t", "ttttt"])]
    generator = Generator(model, 3, places, **options)
    for _ in range(4):  # prefills of both shapes are run, captured, and replayed in turn
        for batch in batches:
            batch = {name: value.cuda() for name, value in batch.items()}
            assert torch.equal(generator.generate(batch, max_new_tokens=NEW).sequences, theirs(model, batch))


def test_a_compiled_step_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="compile must be False for a model on a CPU"):
        Generator(built("llava"), 1, 60, compile=True)


@pytest.mark.parametrize(("name", "early"), [("llava", True), ("qwen2_vl", True), ("qwen3_vl_moe", False)])
def test_a_step_with_experts_is_compiled_without_early_launches(monkeypatch, name, early):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda forward, **options: asked.append(options["options"]))
    decoding._compiled(None, built(name).config.get_text_config())
    known = "triton.enable_pdl" in torch._inductor.list_options()
    assert asked == [{"triton.enable_pdl": True} if early and known else None]


@pytest.mark.parametrize(
    ("target", "dtype"), [("reference", torch.float32), ("cpu", torch.bfloat16), ("triton", torch.bfloat16)]
)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_int4_gives_the_tokens_that_transformers_gives_with_the_same_weights(name, target, dtype):
    model = quantize_rtn(built(name).to(dtype), LSQConfig(group_size=32), target=target)
    batch = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in FAMILIES[name].batch(BATCHES["several"]).items()
    }
    # A static cache on both sides: in bfloat16 another order of the sums may turn a tie.
    expected = theirs(model, batch, cache_implementation="static", disable_compile=True)
    assert torch.equal(generate(model, batch, max_new_tokens=NEW).sequences, expected)


SHARED = {name: built(name, layers=2) for name in ("llava", "qwen2_vl", "qwen3_vl")}


@settings(max_examples=12)
@given(
    st.sampled_from(sorted(SHARED)),
    st.lists(st.text("tI", min_size=1, max_size=4).map(lambda text: text + "t"), min_size=1, max_size=5),
    st.integers(1, 8),
    st.integers(1, 9),
    seeds,
)
def test_any_mix_of_prompts_gives_the_tokens_of_transformers(name, samples, count, every, seed):
    model, batch = SHARED[name], FAMILIES[name].batch(samples)
    model.generation_config.eos_token_id = torch.randint(
        0, 128, (20,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    made = Generator(model, 5, 200).generate(batch, max_new_tokens=count, sync_every=every)
    assert torch.equal(made.sequences, theirs(model, batch, max_new_tokens=count))


def without(batch, name):
    return {key: value for key, value in batch.items() if key != name}


BATCH = FAMILIES["llava"].batch(["ttIt", "tttt"])
WRONG = {
    "no ids": (without(BATCH, "input_ids"), {}, "batch must have input_ids, got attention_mask"),
    "no mask": (
        without(BATCH, "attention_mask"),
        {},
        "must have an attention_mask when it has several rows, got 2 rows",
    ),
    "right padding": (
        FAMILIES["llava"].batch(["ttIt", "tttt"], padding="right"),
        {},
        "left only, got zeros after ones in row 1",
    ),
    "a mask of another shape": (
        BATCH | {"attention_mask": torch.ones(2, 3)},
        {},
        r"attention_mask must have the shape",
    ),
    "float ids": (BATCH | {"input_ids": torch.ones(2, 12)}, {}, "input_ids must have an integer dtype"),
    "ids of one row": (
        BATCH | {"input_ids": torch.ones(12, dtype=torch.long)},
        {},
        r"input_ids must have shape \(samples",
    ),
    "an empty prompt": ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, {}, "input_ids must hold a token"),
    "no new token": (BATCH, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got max_new_tokens=0"),
    "too many tokens": (BATCH, {"max_new_tokens": 250}, "at most the model's 256 positions .* got 262 tokens"),
    "beams": (BATCH, {"generation_config": GenerationConfig(num_beams=3)}, "must have num_beams=1 .* got 3"),
    "a name that the model does not know": (
        BATCH | {"pixel_value": BATCH["pixel_values"]},
        {},
        r"what the model takes, got pixel_values, pixel_value: .*\['pixel_value'\]",
    ),
    "positions": (BATCH | {"position_ids": BATCH["input_ids"]}, {}, "batch must not have position_ids"),
    "token healing": (
        BATCH,
        {"generation_config": GenerationConfig(token_healing=True)},
        "must have token_healing=False .* got True",
    ),
    "forced words": (
        BATCH,
        {"generation_config": GenerationConfig(force_words_ids=[[5]])},
        "must ask for greedy or sampled tokens, got constrained_beam_search",
    ),
    "a time limit": (BATCH, {"generation_config": GenerationConfig(max_time=1.0)}, "must not set max_time, got 1.0"),
}


@pytest.mark.parametrize(("batch", "options", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_generated_is_said_before_any_work(batch, options, said, monkeypatch):
    model = built("llava")

    @functools.wraps(model.forward)  # transformers looks at its arguments
    def forward(*args, **kwargs):
        raise AssertionError("work was done")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises((ValueError, TypeError), match=said):
        generate(model, batch, **({"max_new_tokens": 2} | options))


def test_a_batch_that_is_larger_than_was_said_is_refused():
    generator = Generator(built("llava"), 1, 20)
    with pytest.raises(ValueError, match="at most max_batch=1 rows, got 2"):
        generator.generate(BATCH, max_new_tokens=2)
    one = FAMILIES["llava"].batch(["ttIt"])
    with pytest.raises(ValueError, match="must fit into max_length=20 tokens, got 12 and max_new_tokens=9"):
        generator.generate(one, max_new_tokens=9)
    with pytest.raises(ValueError, match="sync_every must be at least 1"):
        generator.generate(one, max_new_tokens=2, sync_every=0)


def test_arguments_of_another_type_are_named():
    model, one = built("llava"), FAMILIES["llava"].batch(["ttIt"])
    with pytest.raises(TypeError, match="batch must be a mapping with input_ids, got list"):
        generate(model, [one], max_new_tokens=2)
    with pytest.raises(TypeError, match="attention_mask must be a torch.Tensor, got list"):
        generate(model, dict(one) | {"attention_mask": [[1] * 12]}, max_new_tokens=2)
    with pytest.raises(TypeError, match="generation_config must be a GenerationConfig or None, got dict"):
        generate(model, one, max_new_tokens=2, generation_config={"do_sample": True})


def test_models_that_cannot_be_decoded_are_refused():
    with pytest.raises(ValueError, match=r"with a decoder \(get_decoder\(\).layers\), got Linear"):
        Generator(nn.Linear(2, 2), 1, 8)
    with pytest.raises(ValueError, match="evaluation mode"):
        Generator(built("llava").train(), 1, 8)
    model = copy.deepcopy(built("llava"))
    model.get_decoder().config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation must be one of sdpa, eager, got 'flash_attention_2'"):
        Generator(model, 1, 8)


def test_a_text_model_needs_no_images():
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **size)).eval()
    batch = {"input_ids": torch.tensor([[5, 6, 7], [0, 8, 9]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    assert torch.equal(generate(model, batch, max_new_tokens=NEW).sequences, theirs(model, batch))
