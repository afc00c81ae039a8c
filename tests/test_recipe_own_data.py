"""The small recipe on a folder made here: what becomes of its records, and a run of all of it in seconds."""

import json
import shutil

import pytest
import torch
from conversation_cases import turns, vqa_records, write_llava
from PIL import Image

from gracekit.recipe import cli
from gracekit.recipe.bad_records import BadRecordsError
from gracekit.recipe.config import RunConfig
from gracekit.recipe.conversations import load_conversations
from gracekit.recipe.data import (
    PackedVqa,
    Question,
    build_tokenizer,
    encode,
    longest_answer,
    prefix_text,
    question_text,
)
from gracekit.recipe.evaluate import generate_answers
from gracekit.recipe.models import ModelSize, build_model, load_teacher, teacher_outputs
from gracekit.recipe.own_data import describe, load_splits
from gracekit.recipe.processors import load_processor

NAMES = ["teacher"] + [f"{losses}-{kind}" for losses in ("ce", "grace") for kind in ("bf16", "int4-rtn", "int4-qat")]


def make_folder(folder, *, train=12, test=6):
    write_llava(folder, train, records=vqa_records)
    write_llava(folder, test, name="test.json", records=vqa_records)
    return folder


def with_test(folder, *records):
    """The folder with these conversations, each (picture, texts), for a test set."""
    made = [{"image": f"images/{number}.png", "conversations": turns(*texts)} for number, texts in records]
    (folder / "test.json").write_text(json.dumps(made))
    return folder


def arguments(data, output, *more):
    options = {
        "data": data, "output": output, "device": "cpu", "image_size": 16, "teacher_steps": 4, "steps": 4,
        "finish_steps": 2, "batch_size": 4,
    }  # fmt: skip
    return ["recipe", *(part for name, value in options.items() for part in (f"--{name}", str(value))), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    home = tmp_path_factory.mktemp("own")
    assert cli.main(arguments(make_folder(home / "data"), home / "run")) == 0
    return home


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_each_turn_is_a_question_about_its_picture(tmp_path):
    train, test = load_splits(RunConfig(data=str(make_folder(tmp_path)), image_size=24))
    assert (train.images.shape, test.images.shape) == ((12, 3, 24, 24), (6, 3, 24, 24))
    assert train.questions[:3] == [
        Question(0, "what colour is it ?", "red"),
        Question(0, "what shape is it ?", "circle"),
        Question(1, "what colour is it ?", "green"),
    ]
    expected = Image.open(tmp_path / "images" / "5.png").convert("RGB").resize((24, 24), Image.Resampling.BICUBIC)
    assert test.images[5].permute(1, 2, 0).numpy().tobytes() == expected.tobytes()


def test_pixels_are_centred_on_the_training_pictures(tmp_path):
    train, test = load_splits(RunConfig(data=str(make_folder(tmp_path)), image_size=16))
    values = train.pixels(list(range(12)))
    assert abs(values.mean().item()) < 0.01
    assert abs(values.std().item() - 1) < 0.01
    assert (test.centre, test.spread) == (train.centre, train.spread)


def test_records_about_one_picture_share_it(tmp_path):
    folder = with_test(
        make_folder(tmp_path), (0, ["<image>one ?", "two"]), (1, ["<image>a", "b"]), (0, ["c <image>", "d"])
    )
    _, test = load_splits(RunConfig(data=str(folder), image_size=16))
    assert len(test.images) == 2
    assert test.questions == [Question(0, "one ?", "two"), Question(1, "a", "b"), Question(0, "c", "d")]


def test_answers_are_compared_as_models_write_them(tmp_path):
    folder = with_test(make_folder(tmp_path), (0, ["<image>What?", "It's  RED, isn't it?"]))
    _, test = load_splits(RunConfig(data=str(folder), image_size=16))
    answer = test.questions[0].answer
    tokenizer = build_tokenizer([answer])
    assert answer == "it ' s red , isn ' t it ?"
    assert tokenizer.decode(encode(tokenizer, [answer])[0]) == answer
    assert longest_answer(test.questions) == len(encode(tokenizer, [answer])[0]) + 1


def test_questions_are_about_the_pictures_of_their_record_several_or_none(tmp_path):
    folder = make_folder(tmp_path)
    images = ("images/1.png", "images/0.png")
    records = [
        {"image": images[0], "conversations": turns("<image>one ?", "a")},
        {"image": list(images), "conversations": turns("<image> and <image> two ?", "b")},
        {"conversations": turns("none ?", "c")},
        {"conversations": turns("none again ?", "d")},
    ]
    (folder / "train.json").write_text(json.dumps(records))
    train, _ = load_splits(RunConfig(data=str(folder), image_size=16))
    assert train.scenes == ((0,), (0, 1), ())
    assert train.questions == [
        Question(0, "one ?", "a"),
        Question(1, "and two ?", "b"),
        Question(2, "none ?", "c"),
        Question(2, "none again ?", "d"),
    ]
    tokenizer = build_tokenizer(text for q in train.questions for text in (q.text, q.answer))
    packed = PackedVqa(train, tokenizer, image_tokens=4)
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert (packed.input_ids == image).sum(1).tolist() == [4, 8, 0]
    batch = packed.collate([2, 1, 0])
    assert torch.equal(batch["pixel_values"], train.pixels([0, 1, 0]))
    assert packed.places(torch.tensor([1, 0])) == [1, 2, 0]
    assert "pixel_values" not in packed.collate([2])


def test_a_run_learns_and_answers_with_several_pictures_and_with_none(tmp_path):
    """Packed answers of the teacher are those to each question alone, and the students' files ask as they were trained."""
    for name in ("train.json", "test.json"):
        write_llava(tmp_path / "data", 10, name=name)
    more = ("--losses", "grace", "--batch_size", "1")
    assert cli.main(arguments(tmp_path / "data", tmp_path / "run", *more)) == 0
    results = read(tmp_path / "run")
    assert results["questions"] == 16
    train, _ = load_splits(RunConfig(data=str(tmp_path / "data"), image_size=16))
    assert {len(scene) for scene in train.shown} == {0, 1, 2}
    model, tokenizer = load_teacher(str(tmp_path / "run" / "teacher"))
    found = teacher_outputs(model, train, tokenizer, batch_size=3)
    first = 0
    for question in train.questions:
        scene = train.shown[question.image]
        prompt = prefix_text(4, len(scene)) + question_text(question.text)
        (ids, answer) = encode(tokenizer, [prompt, f"{question.answer}"])
        pixels = {"pixel_values": train.pixels(list(scene))} if scene else {}
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answer]), **pixels).logits[0, len(ids) - 1 :]
        torch.testing.assert_close(found.logits[first : first + len(logits)].float(), logits, rtol=1e-2, atol=2e-2)
        first += len(logits)
    processor = load_processor(tmp_path / "run" / "models" / "grace-int4-qat")
    for record in load_conversations(tmp_path / "data" / "train.json")[2:5]:
        asked = processor.encode(record.turns[:1], record.images, add_generation_prompt=True)
        words = " ".join(record.turns[0].text.replace("<image>", " ").split())
        expected = prefix_text(4, len(record.images)) + question_text(words)
        assert asked["input_ids"].tolist() == encode(processor.tokenizer, [expected])[0]


def test_questions_without_pictures_may_fill_a_batch(tmp_path):
    for name in ("train.json", "test.json"):
        write_llava(tmp_path / "data", 10, name=name)
    train, test = load_splits(RunConfig(data=str(tmp_path / "data"), image_size=16))
    tokenizer = build_tokenizer(text for q in train.questions for text in (q.text, q.answer))
    size = ModelSize(width=32, image_size=16, patch_size=8)
    model = build_model(size, tokenizer, seed=0).eval()
    assert any(not test.shown[question.image] for question in test.questions)
    one, many = (
        generate_answers(model, test, tokenizer, image_tokens=size.image_tokens, batch_size=count) for count in (1, 256)
    )
    assert one == many


def test_unknown_words_of_the_test_set_are_counted(tmp_path):
    folder = with_test(
        make_folder(tmp_path),
        (0, ["<image>what purple colour , purple shape ?", "red"]),
        (1, ["<image>what shape ?", "a hexagon"]),
    )
    train, test = load_splits(RunConfig(data=str(folder), image_size=16))
    tokenizer = build_tokenizer(text for q in train.questions for text in (q.text, q.answer))
    found = describe(train, test, tokenizer)
    assert (found["unknown_words"], found["unknown_words_read"], found["unknown_answers"]) == (2, 3, 1)
    assert (found["train_images"], found["train_questions"], found["test_questions"]) == (12, 24, 2)
    with pytest.raises(ValueError, match="made of the tokenizer's words"):
        encode(tokenizer, ["what purple"])
    ids = encode(tokenizer, ["what purple"], open_vocabulary=True)[0]
    assert ids[1] == tokenizer.unk_token_id


def test_records_that_the_small_recipe_cannot_take_are_all_named(tmp_path):
    folder = make_folder(tmp_path)
    Image.effect_noise((64, 64), 50).save(tmp_path / "images" / "cut.jpg")
    jpeg = (tmp_path / "images" / "cut.jpg").read_bytes()
    (tmp_path / "images" / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    asked = turns("<image>what ?", "that")
    records = [
        {"image": "images/0.png", "conversations": asked},
        {"image": ["images/0.png"] * 4, "conversations": turns("<image>" * 4 + "what ?", "that")},
        {"image": "images/0.png", "conversations": [{"from": "system", "value": "Hello."}, *asked]},
        {"image": "images/0.png", "conversations": turns("<image>", "that")},
        {"image": "images/0.png", "conversations": turns("<image>what ?", "</s>")},
        {"image": "images/cut.jpg", "conversations": asked},
        {"image": "images/none.jpg", "conversations": asked},
    ]
    (folder / "train.json").write_text(json.dumps(records))
    with pytest.raises(BadRecordsError) as caught:
        load_splits(RunConfig(data=str(folder), image_size=16))
    assert [(bad.index, bad.kind) for bad in caught.value.records] == [
        (1, "too many images"),
        (2, "system turn"),
        (3, "no words"),
        (4, "special token"),
        (5, "broken image"),
        (6, "missing image"),
    ]


def test_a_run_makes_tokenizer_teacher_and_students_from_nothing(finished):
    results = read(finished / "run")
    assert [variant["name"] for variant in results["variants"]] == NAMES
    assert all(variant["questions"] == 12 for variant in results["variants"])
    assert results["data"]["train_images"] == 12
    assert results["config"]["student"]["image_size"] == 16
    teacher = json.loads((finished / "run" / "teacher" / "training.json").read_text())
    assert teacher["config"]["steps"] == 4
    assert teacher["config"]["train_images"] == 12
    assert results["variants"][0]["accuracy"] == teacher["accuracy"]
    _, test = load_splits(RunConfig(data=str(finished / "data"), image_size=16))
    for variant in results["variants"][1:]:
        answers = json.loads((finished / "run" / "answers" / f"{variant['name']}.json").read_text())["answers"]
        right = sum(given == question.answer for given, question in zip(answers, test.questions, strict=True))
        assert variant["accuracy"] == right / 12


def test_the_report_shows_the_folders_own_pictures(finished):
    page = (finished / "run" / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3 + 6
    assert f"on {finished / 'data'}</h1>" in page
    assert "12 questions about 6 images" in page


def test_a_kept_student_reads_questions_and_pictures_as_it_did_in_training(finished):
    processor = load_processor(finished / "run" / "models" / "grace-int4-qat")
    train, _ = load_splits(RunConfig(data=str(finished / "data"), image_size=16))
    record = load_conversations(finished / "data" / "train.json")[2]
    asked = processor.encode(record.turns[:1], record.images, add_generation_prompt=True)
    torch.testing.assert_close(asked["pixel_values"], train.pixels([2]))
    expected = prefix_text(4) + question_text(train.questions[4].text)
    assert asked["input_ids"].tolist() == encode(processor.tokenizer, [expected])[0]
    whole = processor.encode(record.turns[:2], record.images)
    assert processor.tokenizer.decode(whole["labels"][whole["labels"] >= 0]) == "blue </s>"


def test_a_finished_run_is_left_alone_and_an_unfinished_one_goes_on(finished, tmp_path, capsys):
    """Without its results and one student's stage, a run makes that student anew and the rest is as it was."""
    output = tmp_path / "run"
    shutil.copytree(finished / "run", output)
    assert cli.main(arguments(finished / "data", output)) == 0
    assert "nothing was done" in capsys.readouterr().out
    (output / "results.json").unlink()
    shutil.rmtree(output / "stages" / "grace-bf16")
    for name in ("grace-bf16", "grace-int4-rtn"):
        (output / "answers" / f"{name}.json").unlink()
    teacher = (output / "teacher" / "model.safetensors").stat().st_mtime_ns
    assert cli.main(arguments(finished / "data", output)) == 0
    assert "done already: ce-bf16, ce-int4-qat, ce-start, grace-int4-qat, grace-start" in capsys.readouterr().out
    assert (output / "teacher" / "model.safetensors").stat().st_mtime_ns == teacher
    again, before = read(output), read(finished / "run")
    assert [v["accuracy"] for v in again["variants"]] == [v["accuracy"] for v in before["variants"]]


def test_a_runs_teacher_serves_another_run_of_the_same_size(finished, tmp_path, capsys):
    teacher = str(finished / "run" / "teacher")
    more = ("--teacher", teacher, "--losses", "gdkd", "--seed", "1")
    assert cli.main(arguments(finished / "data", tmp_path / "run", *more)) == 0
    assert not (tmp_path / "run" / "teacher").exists()
    assert cli.main([*arguments(finished / "data", tmp_path / "other", *more), "--image_size", "32"]) == 2
    assert "image_size must be the teacher's, got 32 and 16" in capsys.readouterr().err


def test_what_is_wrong_is_said_before_any_training(tmp_path, capsys):
    folder = make_folder(tmp_path / "data")
    assert cli.main(arguments(tmp_path / "nowhere", tmp_path / "run")) == 2
    assert "one of train.json and train.jsonl, got 0" in capsys.readouterr().err
    kept = (folder / "test.json").read_text()
    (folder / "test.json").write_text('{"records": []}')
    assert cli.main(arguments(folder, tmp_path / "run")) == 2
    assert "data must be a JSON list of records, got an object of type dict" in capsys.readouterr().err
    (folder / "test.json").write_text(kept)
    assert not (tmp_path / "run").exists()
    (folder / "images" / "3.png").unlink()
    assert cli.main(arguments(folder, tmp_path / "run")) == 2
    message = capsys.readouterr().err
    assert "train.json: data must hold" in message
    assert "got 1 bad of 12 (1 missing image)" in message
    assert "got 1 bad of 6 (1 missing image)" in message
    for name in ("train", "test"):
        file = tmp_path / "run" / f"bad_records-{name}.jsonl"
        assert str(file) in message
        assert len(file.read_text().splitlines()) == 1
    assert not (tmp_path / "run" / "teacher").exists()


def test_bad_records_may_be_skipped_in_the_folder_of_a_run_that_was_refused(tmp_path, capsys):
    folder = make_folder(tmp_path / "data")
    (folder / "images" / "10.png").unlink()
    assert cli.main(arguments(folder, tmp_path / "run", "--losses", "ce")) == 2
    assert cli.main(arguments(folder, tmp_path / "run", "--losses", "ce", "--on_bad_record", "skip")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"train.json: 1 of 12 records left out (1 missing image), listed in {tmp_path / 'run'}" in said
    assert not (tmp_path / "run" / "bad_records-test.jsonl").exists()
    data = read(tmp_path / "run")["data"]
    assert (data["train_images"], data["train_bad_records"], data["test_bad_records"]) == (11, 1, 0)
    assert cli.main(arguments(folder, tmp_path / "run", "--losses", "ce", "--seed", "1")) == 2
    assert "run.seed: 0 -> 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 20}, "image_size must be a multiple of 8"),
        ({"image_size": 8}, "image_size must be at least 16"),
        ({"train_images": 100}, "train_images must not be given with data, all of which is used"),
        ({"teacher_steps": 1}, "teacher_steps must be at least 2"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(data="folder", **options)


def test_settings_of_own_data_need_them():
    for name, value in (("image_size", 32), ("image_folder", "x"), ("teacher_steps", 10), ("on_bad_record", "skip")):
        with pytest.raises(ValueError, match=f"{name} must not be given without data"):
            RunConfig(**{name: value})
