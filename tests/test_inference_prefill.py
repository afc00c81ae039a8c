"""A prefill's decoder and vision tower over buffers that stay, as graphs replay them: here without the graphs, token for token."""

import pytest
import torch
from strategies import normal
from test_inference_generate import BATCHES, NAMES, NEW, built, theirs
from tiny_families import FAMILIES

from gracekit.inference import Generator
from gracekit.inference.prefill import DecoderGraphs, TowerGraphs, tower_of


class Captures:
    """In place of CUDA's capture: counts, and runs anew at each replay."""

    def __init__(self):
        self.count = self.replays = 0

    def __call__(self, run):
        self.count += 1
        run()  # as a warm-up does

        def replay():
            self.replays += 1
            return run()

        return replay


def with_captures(model, rows, places=64):
    """A generator whose prefills go through buffers."""
    generator, capture = Generator(model, rows, places), Captures()
    made = generator._for

    def held(positions):
        decoding = made(positions)
        if not decoding._prefills:
            # On CUDA a step before has allocated the cache.
            decoding._forward(decoding.token, decoding.positions, decoding.mask_B11C)
            decoding.graph_prefills(capture)
        return decoding

    generator._for = held
    return generator, capture


@pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_a_shape_that_comes_again_have_the_tokens_of_transformers(name, samples):
    model, few = built(name), 3
    # No room for a prompt after another: whatever a capture has written must be gone.
    length = FAMILIES[name].batch(samples)["input_ids"].shape[1]
    generator, capture = with_captures(model, len(samples), length + few)
    for seed in range(4):
        batch = FAMILIES[name].batch(samples)
        if "pixel_values" in batch:
            batch["pixel_values"] = normal(seed, *batch["pixel_values"].shape, dtype=torch.float32)
        made = generator.generate(batch, max_new_tokens=few)
        assert torch.equal(made.sequences, theirs(model, batch, max_new_tokens=few))
    # DeepStack selects places by their values, so Qwen3-VL runs as it is where there are images.
    eager = name == "qwen3_vl" and "pixel_values" in batch
    tower = tower_of(model)
    parts = (not eager) + (tower is not None and "pixel_values" in batch)
    assert (capture.count, capture.replays) == (parts, 3 * parts)
    assert all("forward" not in vars(part) for part in (model.get_decoder(), tower) if part is not None)


def test_padding_may_change_under_the_same_shape():
    model = built("llava")
    generator, capture = with_captures(model, 2)
    for samples in (["tttttt", "tt"], ["t", "tttttt"], ["tttttt", "ttttt"], ["ttt", "tttttt"]):
        batch = FAMILIES["llava"].batch(samples)
        assert torch.equal(generator.generate(batch, max_new_tokens=NEW).sequences, theirs(model, batch))
    assert (capture.count, capture.replays) == (1, 3)


def test_other_shapes_get_graphs_of_their_own_and_the_oldest_is_let_go():
    model = built("llava")
    generator, capture = with_captures(model, 1)
    for _ in range(2):
        for length in range(3, 14):
            batch = FAMILIES["llava"].batch(["t" * length])
            assert torch.equal(
                generator.generate(batch, max_new_tokens=2).sequences, theirs(model, batch, max_new_tokens=2)
            )
    assert capture.count == 0  # eleven shapes in turn: none was still known
    for _ in range(2):
        generator.generate(batch, max_new_tokens=2)
    assert (capture.count, capture.replays) == (1, 2)


def test_a_forward_that_was_replaced_already_comes_back():
    model = built("llava")
    decoder = model.get_decoder()
    inner = decoder.forward
    decoder.forward = hooked = lambda *args, **kwargs: inner(*args, **kwargs)
    generator, _ = with_captures(model, 1)
    batch = FAMILIES["llava"].batch(["ttt"])
    for _ in range(3):
        assert torch.equal(
            generator.generate(batch, max_new_tokens=2).sequences, theirs(model, batch, max_new_tokens=2)
        )
    assert decoder.forward is hooked


def test_long_prompts_and_unknown_tensors_are_run_as_they_are():
    graphs = DecoderGraphs(built("llava").get_decoder(), None, None)
    short = {"inputs_embeds": torch.zeros(1, 8, 4), "use_cache": True}
    assert graphs._key(short) is not None
    assert graphs._key(short) != graphs._key({"inputs_embeds": torch.zeros(1, 9, 4), "use_cache": True})
    assert graphs._key({"inputs_embeds": torch.zeros(2, 4096, 1)}) is None
    assert graphs._key(short | {"visual_pos_masks": torch.zeros(1, 8, dtype=torch.bool)}) is None
    assert graphs._key(short | {"deepstack_visual_embeds": []}) is None
    assert graphs._key({"use_cache": True}) is None


def test_many_images_and_unknown_tensors_of_a_tower_are_run_as_they_are():
    tower = tower_of(built("llava"))
    graphs, side = TowerGraphs(tower, None), 64 * tower.config.patch_size
    one = torch.zeros(1, 3, side, side, device="meta")
    assert graphs._key({"pixel_values": one}) is not None
    assert graphs._key({"pixel_values": one}) != graphs._key({"pixel_values": one, "return_dict": True})
    assert graphs._key({"pixel_values": one.expand(2, -1, -1, -1)}) is None
    assert graphs._key({"pixel_values": one, "image_sizes": torch.zeros(1, 2)}) is None
    assert graphs._key({"return_dict": True}) is None
    assert graphs._named((one, None), {}) is None
