"""A stream of conversations gives what the indexed data give, in parts that ranks and workers share out, without an end."""

import functools
import json
from itertools import count, islice

import datasets
import pytest
import torch
from conversation_cases import drawing, save_pair, turns, write_llava
from fsdp_on_cpu import set_rank
from ranks import run_ranks
from test_recipe_global_batch import training_arguments
from torch.utils.data import DataLoader, IterableDataset

from gracekit import GraceObjective
from gracekit.recipe.bad_records import BadRecord, BadRecordError, append_bad_record, read_bad_records
from gracekit.recipe.batches import ConversationCollator, ConversationDataset
from gracekit.recipe.conversation_stream import ConversationStream
from gracekit.recipe.conversations import load_conversations
from gracekit.recipe.processors import load_processor
from gracekit.recipe.trainer import GraceTrainer


class Letters:
    """As many tokens as letters, which are numbers; a digit cannot be encoded."""

    def encode(self, said, images):
        text = said[-1].text
        if any(letter.isdigit() for letter in text):
            raise ValueError(f"no digits, got {text!r}")
        return {"input_ids": list(text)}


def talk(answer, **more):
    return {"conversations": turns("?", answer), **more}


def answers(stream, count):
    return ["".join(sample["input_ids"]) for sample in islice(stream, count)]


ALL = "abcdefghij"
TALKS = [talk(letter) for letter in ALL]


def write(folder, records, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def saved(folder):
    datasets.Dataset.from_list(TALKS).save_to_disk(folder / "saved")
    return folder / "saved"


def sharded(shards):
    return datasets.Dataset.from_list(TALKS).to_iterable_dataset(num_shards=shards)


SOURCES = {
    "jsonl": lambda folder: write(folder, TALKS),
    "saved": saved,
    "dataset": lambda folder: datasets.Dataset.from_list(TALKS),
    "list": lambda folder: TALKS,
    "one-shard": lambda folder: sharded(1),
    "five-shards": lambda folder: sharded(5),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_and_workers_share_out_each_pass_without_repetition(tmp_path, source, workers, ranks):
    data, found = SOURCES[source](tmp_path), []
    for rank in range(ranks):
        stream = ConversationStream(data, Letters())
        stream.rank, stream.ranks = rank, ranks
        loader = iter(DataLoader(stream, None, num_workers=workers))
        part = ["".join(next(loader)["input_ids"]) for _ in range(20)]
        again = iter(DataLoader(stream, None, num_workers=workers))
        assert ["".join(next(again)["input_ids"]) for _ in range(20)] == part
        found.append(list(dict.fromkeys(part)))
    assert sorted("".join(letter for part in found for letter in part)) == list(ALL)


def test_a_pass_is_in_the_order_of_the_data_and_the_next_one_follows(tmp_path):
    for name, source in SOURCES.items():
        if name == "five-shards":  # which come in another order
            continue
        assert "".join(answers(ConversationStream(source(tmp_path), Letters()), 25)) == ALL + ALL + ALL[:5]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_pass_of_a_shuffled_data_set_has_an_order_of_its_own_that_comes_again(workers):
    data = sharded(2).shuffle(seed=3, buffer_size=10)
    passes = []
    for _ in range(2):
        loader = DataLoader(ConversationStream(data, Letters()), None, num_workers=workers)
        passes.append("".join("".join(sample["input_ids"]) for sample in islice(loader, 20)))
    assert passes[0] == passes[1]
    assert passes[0][:10] != passes[0][10:]
    assert sorted(passes[0]) == sorted(ALL + ALL)


def test_an_iterable_is_told_the_number_of_the_pass():
    class Told(list):
        def set_epoch(self, epoch):
            told.append(epoch)

    told = []
    answers(ConversationStream(Told(TALKS), Letters()), 25)
    assert told == [0, 1, 2]


def test_a_stream_gives_the_samples_of_the_indexed_data(tmp_path):
    """Real records with pictures, through real workers and the collator."""
    path = write_llava(tmp_path, 10, name="train.jsonl")
    processor = load_processor(save_pair(tmp_path / "model", "qwen2_vl"))
    indexed = ConversationDataset(load_conversations(path), processor, 400)
    collate = ConversationCollator(processor)
    loader = DataLoader(ConversationStream(path, processor, 400), 2, num_workers=1, collate_fn=collate)
    for number, batch in enumerate(islice(loader, 7)):
        expected = collate([indexed[i % 10] for i in (2 * number, 2 * number + 1)])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


BAD = [
    talk("a"),
    {"id": "x"},
    talk("7", id="seven"),
    talk("b"),
    talk("tttttt"),
    {"image": "none.png", "conversations": turns("<image>", "c")},
    talk("d"),
]
KINDS = {1: "no conversation", 2: "cannot be encoded", 4: "too long", 5: "missing image", 7: "broken JSON"}


def bad_data(folder):
    path = write(folder, BAD)
    path.write_text(path.read_text() + "\n{broken\n")
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_skipped_as_they_are_met_and_written_once(tmp_path, workers):
    """Over several passes, in several processes, and by a run that goes on from an interrupted one."""
    file = tmp_path / "run" / "bad.jsonl"
    stream = ConversationStream(bad_data(tmp_path), Letters(), 5, on_bad_record="skip", bad_records_file=file)
    for _ in range(2):
        loader = DataLoader(stream, None, num_workers=workers)
        assert set(answers(loader, 12)) == set("abd")
        found = read_bad_records(file)
        assert {bad.index: bad.kind for bad in found} == KINDS
        assert len(found) == len(KINDS)
    assert found[1] == BadRecord(2, "seven", "cannot be encoded", "cannot be encoded: no digits, got '7'")


def test_records_whose_places_change_are_known_by_name_and_reason(tmp_path):
    class Turned:
        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            shift = self.epoch % len(BAD)
            return iter(BAD[shift:] + BAD[:shift])

    file = tmp_path / "bad.jsonl"
    stream = ConversationStream(Turned(), Letters(), 5, on_bad_record="skip", bad_records_file=file)
    answers(stream, 9)
    answers(stream, 9)
    found = [bad.id for bad in read_bad_records(file) if not bad.id.isdigit()]
    assert found == ["x", "seven"]


def test_a_broken_picture_that_a_data_set_leaves_undecoded_costs_its_record_alone():
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "image": datasets.Image(),
        }
    )
    said = [{"role": "user", "content": "<image>what ?"}, {"role": "assistant", "content": "that"}]
    rows = {"messages": [said] * 3, "image": [drawing(0)[0], {"bytes": b"no picture"}, drawing(1)[0]]}
    data = datasets.Dataset.from_dict(rows, features=features)
    for records in (data, data.to_iterable_dataset().decode(False)):
        stream = ConversationStream(records, Letters(), on_bad_record="skip")
        assert [record.index for record in stream.first(9)] == [0, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_record_stops_where_it_is_met_and_the_error_is_its_line_alone(tmp_path, workers):
    file = tmp_path / "bad.jsonl"
    stream = ConversationStream(write(tmp_path, BAD[:1] + BAD[2:]), Letters(), 5, bad_records_file=file)
    loader = iter(DataLoader(stream, None, num_workers=workers))
    assert next(loader)["input_ids"] == ["a"]
    with pytest.raises(BadRecordError) as caught:
        next(loader)
    assert str(caught.value) == (
        "data must hold good records only, or be read with on_bad_record='skip', got record 1 ('seven'): "
        "cannot be encoded: no digits, got '7'"
    )
    assert [bad.index for bad in read_bad_records(file)] == [1]


def test_processes_add_whole_lines_to_one_file(tmp_path):
    file = tmp_path / "bad.jsonl"

    class Writing:
        def __len__(self):
            return 200

        def __getitem__(self, index):
            append_bad_record(file, BadRecord(index, "é" * 1000, "bad", "bad"))
            return index

    assert list(DataLoader(Writing(), None, num_workers=2)) == list(range(200))
    assert [bad.index for bad in read_bad_records(file)] == list(range(200))


def test_the_first_good_records_are_found_without_a_word_to_the_file(tmp_path):
    path, file = bad_data(tmp_path), tmp_path / "bad.jsonl"
    stream = ConversationStream(path, Letters(), 5, on_bad_record="skip", bad_records_file=file)
    assert [record.index for record in stream.first(2)] == [0, 3]
    assert [record.index for record in stream.first(64)] == [0, 3, 6]
    assert not file.exists()
    with pytest.raises(BadRecordError, match=r"got record 1 \('x'\): no conversation"):
        ConversationStream(path, Letters(), 5).first(2)


@pytest.mark.parametrize("data", [[{"id": "x"}] * 3, [{"id": "x"}], []])
def test_data_without_a_good_record_are_refused_instead_of_read_for_ever(data):
    stream = ConversationStream(data, Letters(), on_bad_record="skip")
    for rank in (0, 1):
        stream.rank, stream.ranks = rank, 2
        with pytest.raises(ValueError, match=f"at least one good record .* of rank {rank}, worker 0"):
            next(iter(stream))
    with pytest.raises(ValueError, match="at least one good record"):
        stream.first(2)


def test_workers_that_have_no_record_leave_the_rest_to_the_others():
    loader = DataLoader(ConversationStream(TALKS[:1], Letters()), None, num_workers=2)
    assert answers(loader, 3) == list("aaa")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("none.jsonl", "which is not there"),
        ("data.json", r"must be a \.jsonl file or a saved data set, because JSON is read as a whole"),
        (iter(TALKS), "that can be iterated over again, got list_iterator"),
        ({"train": TALKS}, "got dict"),
        (3, "got int"),
    ],
)
def test_what_is_no_stream_is_refused(tmp_path, data, message):
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(ValueError, match=message):
        ConversationStream(tmp_path / data if isinstance(data, str) else data, Letters())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        ConversationStream(TALKS, Letters(), 0)
    with pytest.raises(ValueError, match="on_bad_record must be one of 'stop', 'skip'"):
        ConversationStream(TALKS, Letters(), on_bad_record="ignore")


def loader_rank(rank, world, folder):
    """What each rank encodes and what its trainer's loader gives, also after batches that are skipped."""
    from accelerate.data_loader import skip_first_batches
    from transformers import AutoModelForImageTextToText

    set_rank(rank, world)
    processor = load_processor(f"{folder}/model")
    stream = ConversationStream(f"{folder}/train.jsonl", processor, 400)
    trainer = GraceTrainer(
        losses="ce",
        objective=GraceObjective(),
        model=AutoModelForImageTextToText.from_pretrained(f"{folder}/model"),
        train_dataset=stream,
        data_collator=ConversationCollator(processor),
        args=training_arguments(f"{folder}/run", batch_size=2, accumulate=1),
    )
    indexed = ConversationDataset(load_conversations(f"{folder}/train.jsonl"), processor, 400)
    loader = trainer.get_train_dataloader()
    for skipped, dealt in ((0, loader), (1, skip_first_batches(loader, 1))):
        for number, batch in enumerate(islice(dealt, 3), skipped):
            mine = [indexed[(rank + world * i) % 10] for i in (2 * number, 2 * number + 1)]
            expected = ConversationCollator(processor)(mine)
            assert torch.equal(batch["input_ids"], expected["input_ids"])
            assert batch["pixel_values"].shape == expected["pixel_values"].shape
    trainer.train_dataset = Endless(indexed)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = ConversationCollator(processor)([indexed[2 * rank], indexed[2 * rank + 1]])
    assert torch.equal(batch["input_ids"], expected["input_ids"])


class Endless(IterableDataset):
    """Any other data set without a length."""

    def __init__(self, indexed):
        self.indexed = indexed

    def __iter__(self):
        return (self.indexed[i % 10] for i in count())


@pytest.mark.slow
def test_a_trainers_ranks_encode_their_own_records_alone(tmp_path):
    write_llava(tmp_path, 10, name="train.jsonl")
    save_pair(tmp_path / "model", "qwen2_vl")
    run_ranks(functools.partial(loader_rank, folder=str(tmp_path)))
