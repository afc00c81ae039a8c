"""Samples of every family as one batch: models take it, and the tap finds each image's tokens in it."""

import pickle

import pytest
import torch
import transformers
from conversation_cases import FAMILIES, save_pair, write_llava
from torch.utils.data import DataLoader

from gracekit.recipe.batches import ConversationCollator, ConversationDataset
from gracekit.recipe.conversations import load_conversations
from gracekit.recipe.processors import load_processor
from gracekit.vlm import VisualTokenTap

MIXED, PICTURELESS = [0, 3, 4, 1], [4, 9]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return load_conversations(write_llava(tmp_path_factory.mktemp("data"), 10))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def dataset(records, folder):
    return ConversationDataset(records, load_processor(folder), 400)


@pytest.fixture
def model(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()


def alone(model, sample):
    """Logits of one sample, given to the model without any of the code under test."""
    inputs = {k: v[None] if v.shape == sample["input_ids"].shape else v for k, v in sample.items() if k != "labels"}
    with torch.no_grad():
        return model(**inputs).logits[0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("indices", [MIXED, PICTURELESS])
def test_a_batch_computes_what_its_samples_do(side, indices, dataset, model):
    samples = [dataset[i] for i in indices]
    batch = ConversationCollator(dataset.processor, side)(samples)
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    for row, sample in enumerate(samples):
        real = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][real], sample["input_ids"])
        assert torch.equal(batch["labels"][row][real], sample["labels"])
        assert (batch["labels"][row][~real] == -100).all()
        torch.testing.assert_close(logits[row][real], alone(model, sample), rtol=1e-4, atol=1e-5)


def test_the_tap_finds_each_image_of_a_batch(dataset, model):
    samples = [dataset[i] for i in MIXED]
    batch = ConversationCollator(dataset.processor, "left")(samples)
    assert ("pixel_values" in samples[2]) is False
    with VisualTokenTap(model) as tap, torch.no_grad():
        model(**{k: v for k, v in batch.items() if k != "labels"})
        tokens, lengths = tap.tokens(batch)
    placeholder = model.config.image_token_id
    per_sample = [int((sample["input_ids"] == placeholder).sum()) for sample in samples]
    assert len(lengths) == 4
    assert [lengths[0], lengths[1] + lengths[2], 0, lengths[3]] == per_sample
    assert len(tokens) == sum(per_sample)


def test_a_batch_without_images_has_no_pixels(dataset):
    batch = ConversationCollator(dataset.processor, "right")([dataset[i] for i in PICTURELESS])
    assert not any(name.startswith(("pixel", "image")) for name in batch)


def test_the_loss_reaches_the_models_weights(dataset, model):
    batch = ConversationCollator(dataset.processor, "right")([dataset[i] for i in MIXED])
    model(**batch).loss.backward()
    assert sum(p.grad.abs().sum() for p in model.get_decoder().parameters()) > 0


def test_items_do_not_depend_on_the_process_that_makes_them(records, tmp_path):
    """A worker that starts from nothing: whatever an item needs is in the data set."""
    dataset = ConversationDataset(records, load_processor(save_pair(tmp_path / "m", "qwen2_vl")), 400)
    collate = ConversationCollator(dataset.processor, "right")
    loader = DataLoader(dataset, 2, num_workers=1, collate_fn=collate, multiprocessing_context="spawn")
    here = [collate([dataset[i], dataset[i + 1]]) for i in range(0, 10, 2)]
    for found, expected in zip(loader, here, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_dataset_and_a_collator_can_be_sent(dataset):
    again = pickle.loads(pickle.dumps((dataset, ConversationCollator(dataset.processor, "left"))))
    assert torch.equal(again[0][0]["input_ids"], dataset[0]["input_ids"])


def test_a_sample_that_is_too_long_is_named(records, dataset):
    length = max(len(dataset[i]["input_ids"]) for i in range(len(dataset)))
    left = records.check_lengths(dataset.processor, length)
    assert len(left) == len(records)
    with pytest.raises(ValueError, match=r"too long: \d+ tokens, max_length="):
        records.check_lengths(dataset.processor, length - 1)
    with pytest.raises(ValueError, match=r"at most max_length=5 tokens, got \d+ in record 0 \('r0'\)"):
        ConversationDataset(records, dataset.processor, 5)[0]


def test_arguments_are_checked(records, dataset):
    with pytest.raises(ValueError, match="padding_side must be one of 'right', 'left', got padding_side='up'"):
        ConversationCollator(dataset.processor, "up")
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        ConversationDataset(records, dataset.processor, 0)
