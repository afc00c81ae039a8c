"""Records in both formats and from all sources; whatever is wrong with one is found before training."""

import json
import pickle

import datasets
import numpy as np
import pytest
from conversation_cases import drawing, turns, write_llava, write_pictures
from PIL import Image

from gracekit.recipe.conversations import BadRecordsError, Turn, find_conversations, load_conversations, open_images
from gracekit.recipe.record_format import RecordError, open_image

GOOD = {"id": "good", "conversations": turns("one ?", "one")}
TWO_SIDED = [{"role": "user", "content": "one ?"}, {"role": "assistant", "content": "one"}]


def write(folder, records, name="data.json"):
    path = folder / name
    path.write_text(json.dumps(records) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_json_and_its_lines_give_the_same_records(name, tmp_path):
    records = load_conversations(write_llava(tmp_path, 10, name=name))
    assert len(records) == 10
    assert [len(record.images) for record in records] == [1, 1, 1, 2, 0, 1, 1, 2, 1, 0]
    first = records[0]
    assert (first.index, first.id, first.images) == (0, "r0", (tmp_path / "images" / "0.png",))
    assert first.turns == (
        Turn("user", "<image>\nWhat colour is it?"),
        Turn("assistant", "red"),
        Turn("user", "And what shape?"),
        Turn("assistant", "It is a circle."),
    )
    assert [record.index for record in records[2:9:3]] == [2, 5, 8]
    assert records[-1] == records[9]
    assert open_images(records[3])[1].mode == "RGB"


def test_messages_say_the_same_as_conversations(tmp_path):
    write_pictures(tmp_path, 2)
    parts = [
        {"type": "image"},
        {"type": "text", "text": "and "},
        {"type": "image"},
        {"type": "text", "text": "What are these?"},
    ]
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "shapes"}]},
    ]
    names = ["images/0.png", "images/1.png"]
    inside = [{**part, "image": names.pop(0)} if part["type"] == "image" else part for part in parts]
    both = [
        {"messages": messages, "images": ["images/0.png", "images/1.png"]},
        {"messages": [messages[0], {"role": "user", "content": inside}, messages[2]]},
        {
            "image": ["images/0.png", "images/1.png"],
            "conversations": [
                {"from": "system", "value": "Be short."},
                *turns("<image>and <image>What are these?", "shapes"),
            ],
        },
    ]
    found = list(load_conversations(write(tmp_path, both, "data.jsonl")))
    assert [record.turns for record in found] == [found[0].turns] * 3
    assert [record.images for record in found] == [found[0].images] * 3
    assert found[0].turns[1].text == "<image>and <image>What are these?"


def test_a_data_set_holds_its_pictures_itself(tmp_path):
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": datasets.List(datasets.Image()),
        }
    )
    rows = {
        "messages": [[{**TWO_SIDED[0], "content": "<image>what ?"}, TWO_SIDED[1]], TWO_SIDED],
        "images": [[drawing(0)[0]], []],
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(tmp_path / "saved")
    for records in (load_conversations(made), load_conversations(tmp_path / "saved")):
        assert [len(record.images) for record in records] == [1, 0]
        assert open_images(records[0])[0].tobytes() == drawing(0)[0].tobytes()
    bytes_only = made.cast_column("images", datasets.List(datasets.Image(decode=False)))
    assert open_images(load_conversations(bytes_only)[0])[0].tobytes() == drawing(0)[0].tobytes()
    with pytest.raises(ValueError, match=r"an iterable one is for a ConversationStream.* got IterableDataset"):
        load_conversations(made.to_iterable_dataset())
    datasets.DatasetDict(train=made).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"must be one split, got .* with splits \['train'\]"):
        load_conversations(tmp_path / "splits")


def test_a_broken_picture_in_a_data_set_is_a_bad_record():
    features = datasets.Features({"messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
                                  "image": datasets.Image()})  # fmt: skip
    rows = {"messages": [[{**TWO_SIDED[0], "content": "<image>"}, TWO_SIDED[1]]], "image": [{"bytes": b"no picture"}]}
    with pytest.raises(BadRecordsError, match="1 broken image"):
        load_conversations(datasets.Dataset.from_dict(rows, features=features))


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_sixteen_bits_of_grey_become_eight(name, tmp_path):
    levels = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / name)
    expected = np.round(levels / 257)
    assert expected.tolist() == [[0, 0, 1, 1, 128, 254, 255, 255]]
    with Image.open(tmp_path / name) as opened:
        for picture in (tmp_path / name, opened):
            assert (np.asarray(open_image(picture)) == expected[..., None]).all()


def test_integers_of_a_png_are_of_sixteen_bits_in_every_mode(tmp_path):
    """Earlier Pillows open it in mode I."""
    Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        picture.load()
        wide = picture.convert("I")
    wide.format = "PNG"
    assert np.asarray(open_image(wide)).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floats"), (np.int32, "integers beyond 16 bits")])
def test_a_picture_of_unknown_range_is_a_bad_record(dtype, kind, tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], dtype=dtype))
    picture.save(tmp_path / "x.tif")
    for given in (picture, tmp_path / "x.tif"):
        with pytest.raises(RecordError, match=f"image of unknown range.*must have 8 or 16 bits, got {kind}"):
            open_image(given)
    data = write(tmp_path, [{"image": "x.tif", "conversations": turns("<image>\nwhat ?", "that")}])
    with pytest.raises(BadRecordsError, match="1 image of unknown range"):
        load_conversations(data)


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_a_picture_is_turned_as_its_exif_says_wherever_it_stands(mode, tmp_path):
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6  # its top is on the right
    plain = (
        drawing(0)[0] if mode == "RGB" else Image.fromarray(np.arange(0, 60000, 100, dtype=np.uint16).reshape(20, 30))
    )
    plain.save(tmp_path / "x.png", exif=exif)
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": datasets.List(datasets.Image()),
        }
    )
    rows = {
        "messages": [[{**TWO_SIDED[0], "content": "<image>what ?"}, TWO_SIDED[1]]],
        "images": [[str(tmp_path / "x.png")]],
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    from_path, opened = open_image(tmp_path / "x.png"), Image.open(tmp_path / "x.png")
    assert from_path.size == plain.size[::-1]
    assert from_path.tobytes() == open_image(plain).transpose(Image.Transpose.ROTATE_270).tobytes()
    for picture in (opened, *load_conversations(made)[0].images):
        assert open_image(picture).tobytes() == from_path.tobytes()


def bad_records(folder):
    """One record of each kind that is wrong, by the kind's name."""
    Image.new("RGB", (8, 8)).save(folder / "whole.png")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:45])
    asked = turns("<image>\nwhat ?", "that")
    return {
        "missing image": {"image": "none.png", "conversations": asked},
        "broken image": {"image": "text.png", "conversations": asked},
        "number of image markers": {"image": "whole.png", "conversations": turns("no marker ?", "none")},
        "no assistant turn": {"conversations": turns("alone")},
        "roles do not alternate": {"conversations": [*turns("a", "b"), {"from": "gpt", "value": "again"}]},
        "empty answer": {"conversations": turns("a", "  ")},
        "image marker outside a user's turn": {"conversations": turns("a", "<image>")},
        "unknown role": {"conversations": [{"from": "nobody", "value": "x"}]},
        "unknown role ": {"conversations": [{"from": ["human"], "value": "x"}]},
        "no text": {"conversations": [{"from": "human", "value": 3}]},
        "no text ": {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}, TWO_SIDED[1]]},
        "no text  ": {"messages": [{"role": "user", "content": [{"type": "text", "text": 0}]}, TWO_SIDED[1]]},
        "no Unicode text": {"conversations": turns("half \ud83d a pair", "x")},
        "missing image ": {"image": "n" * 5000, "conversations": asked},
        "no conversation": {"id": "x"},
        "no record": "text",
        "unknown content": {"messages": [{"role": "user", "content": [{"type": "sound"}]}]},
        "images twice": {
            "images": ["whole.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "whole.png"}]},
                {"role": "assistant", "content": "x"},
            ],
        },
        "no image": {"image": [3], "conversations": asked},
    }


def test_every_bad_record_is_named_before_training(tmp_path):
    bad = bad_records(tmp_path)
    bad = {**bad, "broken image ": {**bad["broken image"], "image": "cut.png"}}
    path = write(tmp_path, [GOOD, *bad.values(), GOOD])
    with pytest.raises(BadRecordsError) as caught:
        load_conversations(path)
    assert [record.kind for record in caught.value.records] == [kind.strip() for kind in bad]
    assert max(len(record.reason) for record in caught.value.records) < 400
    assert [record.index for record in caught.value.records] == list(range(1, len(bad) + 1))
    text = str(caught.value)
    assert "got 20 bad of 22 (3 no text, 2 missing image, 2 broken image, 2 unknown role, 1 number" in text
    assert f"record 1 ('1'): missing image: {tmp_path / 'none.png'}" in text
    assert "record 3 ('3'): number of image markers: 1 images and 0 <image> in the user's turns" in text


def test_a_trailing_question_and_a_leading_answer_do_not_alternate(tmp_path):
    for said in (turns("a", "b", "c"), turns("a", "b", "c", "d")[1:]):
        with pytest.raises(BadRecordsError, match="1 roles do not alternate"):
            load_conversations(write(tmp_path, [{"conversations": said}]))


def test_the_message_stays_readable_with_many_bad_records_and_names_the_file_of_all(tmp_path):
    path = write(tmp_path, [{"id": "x"}] * 1234 + [GOOD], "data.jsonl")
    for file, named in ((None, "the records of this error"), (tmp_path / "new" / "bad.jsonl",) * 2):
        with pytest.raises(BadRecordsError) as caught:
            load_conversations(path, bad_records_file=file)
        assert len(caught.value.records) == 1234
        assert len(str(caught.value).splitlines()) == 22
        assert str(caught.value).endswith(f"and 1,214 more: all are in {named}")
    assert [json.loads(line)["index"] for line in file.read_text().splitlines()] == list(range(1234))
    load_conversations(write(tmp_path, [GOOD]), bad_records_file=file)
    assert not file.exists()


def test_skipped_records_are_counted_and_written(tmp_path):
    bad = bad_records(tmp_path)
    path = write(tmp_path, [GOOD, *bad.values(), GOOD])
    left_out = tmp_path / "run" / "bad.jsonl"
    records = load_conversations(path, on_bad_record="skip", bad_records_file=left_out)
    assert [record.index for record in records] == [0, len(bad) + 1]
    assert [record.kind for record in records.bad] == [kind.strip() for kind in bad]
    written = [json.loads(line) for line in left_out.read_text().splitlines()]
    assert [(w["index"], w["kind"]) for w in written] == [(record.index, record.kind) for record in records.bad]
    assert [p.name for p in left_out.parent.iterdir()] == ["bad.jsonl"]


def test_a_line_that_is_no_json_costs_that_line_alone(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{json.dumps(GOOD)}\n\n{{"id": 3,\n{json.dumps(GOOD)}')
    records = load_conversations(path, on_bad_record="skip")
    assert [(record.kind, record.index) for record in records.bad] == [("broken JSON", 1)]
    assert [record.id for record in records] == ["good", "good"]


def test_lines_are_read_when_they_are_asked_for(tmp_path):
    """What is kept of a JSONL file does not grow with its lines' length, and goes to worker processes."""
    sizes = []
    for length in (10, 100_000):
        long = {"conversations": turns("é" * length, "ü")}
        records = load_conversations(write(tmp_path, [long] * 20, f"{length}.jsonl"))
        sizes.append(len(pickle.dumps(records)))
        assert pickle.loads(pickle.dumps(records))[19].turns[0].text == "é" * length
    assert sizes[1] < sizes[0] + 100


class Counting:
    """As many tokens as letters; digits cannot be encoded."""

    def encode(self, said, images):
        text = "".join(turn.text for turn in said)
        if any(letter.isdigit() for letter in text):
            raise ValueError(f"no digits, got {text!r}")
        return {"input_ids": list(text)}


def test_records_that_are_too_long_or_cannot_be_encoded_are_treated_alike(tmp_path):
    said = [turns("a", "b"), turns("aaaa", "b"), turns("aaaaa", "b"), turns("a", "7")]
    path = write(tmp_path, [{"conversations": one} for one in said] + [{"id": "x"}])
    file = tmp_path / "bad.jsonl"
    done = []
    records = load_conversations(path, on_bad_record="skip", bad_records_file=file)
    records = records.check_lengths(Counting(), 5, advance=done.append)
    assert sum(done) == 4
    assert [record.index for record in records] == [0, 1]
    assert [(bad.index, bad.reason) for bad in records.bad[:2]] == [
        (2, "too long: 6 tokens, max_length=5"),
        (3, "cannot be encoded: no digits, got 'a7'"),
    ]
    assert len(file.read_text().splitlines()) == 3
    with pytest.raises(BadRecordsError, match="1 too long"):
        load_conversations(write(tmp_path, [{"conversations": said[2]}])).check_lengths(Counting(), 5)
    with pytest.raises(BadRecordsError, match=r"got 1 bad of 1 \(1 too long\)"):
        load_conversations(path, on_bad_record="skip").check_lengths(Counting(), 1)


def test_one_error_lists_what_both_passes_found(tmp_path):
    path = write(
        tmp_path, [{"id": "x"}, {"conversations": turns("a", "7")}, GOOD, {"conversations": turns("a" * 9, "b")}]
    )
    file = tmp_path / "bad.jsonl"
    known = []
    with pytest.raises(BadRecordsError, match=f"also in {file}") as caught:
        find_conversations(path, bad_records_file=file, begin=known.append).check_lengths(Counting(), 8)
    assert known == [4]
    assert [bad.kind for bad in caught.value.records] == ["no conversation", "cannot be encoded", "too long"]
    assert len(file.read_text().splitlines()) == 3
    skipped = find_conversations(path, on_bad_record="skip", bad_records_file=file).check_lengths(Counting(), 8)
    assert [record.index for record in skipped] == [2]
    assert skipped.note() == (
        f"3 of 4 records left out (1 no conversation, 1 cannot be encoded, 1 too long), listed in {file}"
    )
    with pytest.raises(BadRecordsError, match="at least one good record, got 1 bad of 1"):
        load_conversations(write(tmp_path, [{"id": "x"}]), on_bad_record="skip")


def test_a_picture_that_is_cut_off_is_found_when_lengths_are_checked(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    path = write(tmp_path, [{"image": "cut.jpg", "conversations": turns("<image>what ?", "that")}])
    with pytest.raises(BadRecordsError, match="broken image: .*cut.jpg"):
        load_conversations(path).check_lengths(Counting(), 100)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("none.json", "which is not there"),
        ("data.csv", r"must end in \.json or \.jsonl"),
        ("object.json", "must be a JSON list"),
        ("text.json", "must be JSON"),
        ("folder", "no state.json"),
        ({"train": 1}, "got dict"),
        ("empty.json", "at least one record, got 0"),
    ],
)
def test_what_is_no_data_is_refused(data, message, tmp_path):
    (tmp_path / "folder").mkdir()
    for name, text in (("data.csv", "a"), ("object.json", "{}"), ("text.json", "{"), ("empty.json", "[]")):
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_conversations(tmp_path / data if isinstance(data, str) else data)


def test_images_may_lie_elsewhere(tmp_path):
    (tmp_path / "text").mkdir()
    write_pictures(tmp_path / "pictures", 1)
    record = {"image": "images/0.png", "conversations": turns("<image>what ?", "that")}
    path = write(tmp_path / "text", [record])
    assert load_conversations(path, tmp_path / "pictures")[0].images == (tmp_path / "pictures" / "images" / "0.png",)
    with pytest.raises(BadRecordsError, match="1 missing image"):
        load_conversations(path)
    with pytest.raises(ValueError, match="on_bad_record must be one of 'stop', 'skip'"):
        load_conversations(path, on_bad_record="ignore")
