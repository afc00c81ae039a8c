"""gracekit evaluate: its answers are those of generate asked one by one, in each precision, and none is asked twice."""

import json
import os
import shutil

import datasets
import pytest
import torch
from conversation_cases import llava_records, save_pair, turns, write_llava, write_pictures
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from gracekit.quant import LSQConfig, convert, load_qat, prepare_qat, quantize_rtn, save_qat
from gracekit.recipe import evaluate_model
from gracekit.recipe.answering import load_model
from gracekit.recipe.cli import main
from gracekit.recipe.kept_answers import open_answers
from gracekit.recipe.metrics import exact_match
from gracekit.recipe.processors import load_processor
from gracekit.recipe.questions import read_questions

CPU = torch.device("cpu")
NEW = 6


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "qwen3_vl"])
def pair(request, tmp_path_factory):
    return tmp_path_factory.mktemp("models") / request.param, request.param


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llava"
    save_pair(folder, "llava")
    return folder


@pytest.fixture(scope="module")
def trained(llava, tmp_path_factory):
    """The same model after learned scales moved, as save_qat leaves it, with its processor elsewhere."""
    model = AutoModelForImageTextToText.from_pretrained(llava, dtype="auto")
    prepare_qat(model, LSQConfig(group_size=32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("log_scale"):
                parameter += 0.3
    save_qat(model, folder := tmp_path_factory.mktemp("models") / "trained")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("data"), 6, name="test.json")


def arguments(folder, data, output, *more):
    options = {
        "data": data,
        "output": output,
        "max-new-tokens": NEW,
        "batch-size": 4,
        "group-size": 32,
        "device": "cpu",
    }
    return ["evaluate", str(folder), *(part for k, v in options.items() for part in (f"--{k}", str(v))), *more]


def answers(output):
    lines = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    return {(line["record"], line["turn"]): line["answer"] for line in lines}


@torch.no_grad()
def one_by_one(model, processor, asked):
    """The greedy answer to one question alone: the likeliest token, appended, again and again, without a cache."""
    record = asked.record
    before = record.turns[: asked.turn]
    images = record.images[: sum(turn.text.count("<image>") for turn in before)]
    inputs = processor.encode(before, images, add_generation_prompt=True)
    ids, tokens = inputs.pop("input_ids")[None], []
    inputs.pop("labels", None)
    kinds = inputs.pop("mm_token_type_ids", None)
    inputs = {name: v.to(model.dtype) if v.is_floating_point() else v for name, v in inputs.items()}
    for _ in range(NEW):
        if kinds is not None:
            inputs["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(len(tokens))])[None]
        grown = torch.cat([ids, ids.new_tensor([tokens])], 1) if tokens else ids
        given = {"input_ids": grown, "attention_mask": torch.ones_like(grown), "use_cache": False}
        tokens.append(int(model(**given, **inputs).logits[0, -1].argmax()))
        if tokens[-1] == processor.tokenizer.eos_token_id:
            break
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_batched_answers_are_those_of_each_question_alone(pair, data, tmp_path):
    folder, family = pair
    save_pair(folder, family)
    assert main(arguments(folder, data, tmp_path / "out", "--precision", "fp32")) == 0
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = load_processor(folder)
    questions = read_questions(data, None)
    given = answers(tmp_path / "out")
    assert {asked.key: given[asked.key] for asked in questions} == {
        asked.key: one_by_one(model, processor, asked) for asked in questions
    }
    assert len(set(given.values())) > 1
    assert main(arguments(folder, data, tmp_path / "own", "--precision", "fp32", "--engine", "gracekit")) == 0
    assert answers(tmp_path / "own") == given


def test_every_answer_in_the_data_is_a_question_with_what_stands_before_it(data):
    questions = read_questions(data, None)
    made = llava_records([(f"{i}", "x", "y") for i in range(6)])
    assert [asked.key for asked in questions] == [
        (i, place) for i, record in enumerate(made) for place in range(1, len(record["conversations"]), 2)
    ]
    second = questions[1]
    assert (second.turn, second.text, second.truths) == (3, "And what shape?", ("It is a circle.",))


def test_the_result_is_the_mean_of_the_scores_with_its_standard_error(llava, data, tmp_path):
    assert main(arguments(llava, data, tmp_path, "--precision", "fp32")) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    questions, given = read_questions(data, None), answers(tmp_path)
    scores = [exact_match(given[asked.key], asked.truths) for asked in questions]
    assert result["scores"] == scores
    assert result["accuracy"] == sum(scores) / len(scores)
    assert result["standard_error"] == pytest.approx(torch.tensor(scores).std(correction=0).item() / len(scores) ** 0.5)
    assert (result["metric"], result["kernel"], result["questions"]) == ("exact", "torch", len(questions))
    assert result["environment"]["packages"]["torch"]


def test_a_folder_is_run_in_what_it_holds_and_in_nothing_less(llava, trained, data, tmp_path, capsys):
    model = AutoModelForImageTextToText.from_pretrained(llava, dtype="auto")
    prepare_qat(model, LSQConfig(bits=8, group_size=32))
    save_qat(model, wide := tmp_path / "wide")
    convert(model, "portable", dtype=torch.bfloat16).to(torch.bfloat16).save_pretrained(packed := tmp_path / "packed")
    more = ["--processor", str(llava)]
    for folder, precision, kernel in (
        (llava, "bf16", "torch"),
        (trained, "int4", "Int4OpaqueTensor"),
        (wide, "int8", "IntxUnpackedToInt8Tensor"),
        (packed, "int8", "IntxUnpackedToInt8Tensor"),
    ):
        assert main(arguments(folder, data, tmp_path / "out" / folder.name, *more)) == 0
        result = json.loads((tmp_path / "out" / folder.name / "result.json").read_text())
        assert (result["settings"]["precision"], kernel in result["kernel"]) == (precision, True)
        assert f"; {precision}, " in capsys.readouterr().out
    for folder, precision, message in (
        (trained, "bf16", "precision must be int4 for .* which has learned scales, .* got 'bf16'"),
        (trained, "fp32", "got 'fp32'"),
        (trained, "int4-rtn", "got 'int4-rtn'"),
        (packed, "bf16", "precision must be int8 for .* which has packed codes, got 'bf16'"),
        (wide, "int4", "precision int4 needs learned scales or packed codes of it, got one of int8"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(folder, precision, CPU)
        assert main(arguments(folder, data, tmp_path / "refused", *more, "--precision", precision)) == 2
        assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fake", "int4-rtn", "int4"])
def test_each_precision_is_the_library_own_form_of_the_model(llava, trained, precision):
    folder = trained if precision in ("fake", "int4") else llava
    found = load_model(folder, precision, CPU, group_size=32)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    if precision in ("fake", "int4"):
        load_qat(model, folder)
    if precision == "int4":
        convert(model, dtype=torch.bfloat16)
    if precision not in ("fake", "fp32"):
        model.to(torch.bfloat16)
    if precision == "int4-rtn":
        quantize_rtn(model, LSQConfig(group_size=32))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits, model(input_ids=ids).logits)
    assert found.dtype == (torch.bfloat16 if precision in ("bf16", "int4", "int4-rtn") else torch.float32)


def test_learned_scales_are_evaluated_with_a_processor_from_elsewhere_and_on_the_kernel(llava, trained, data, tmp_path):
    for precision in ("fake", "int4"):
        more = ["--precision", precision, "--processor", str(llava)]
        assert main(arguments(trained, data, tmp_path / precision, *more)) == 0
    result = json.loads((tmp_path / "int4" / "result.json").read_text())
    assert result["kernel"] == "torchao Int4OpaqueTensor (cpu)"


def test_packed_codes_give_the_logits_of_the_trained_model_on_the_kernel(trained, tmp_path):
    output = tmp_path / "packed"
    options = ["--format", "torchao", "--dtype", "bfloat16", "--output", str(output)]
    assert main(["export", str(trained), *options]) == 0
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, other = (load_model(folder, "int4", CPU)(input_ids=ids).logits for folder in (output, trained))
    assert torch.equal(one, other)


def test_a_finished_evaluation_asks_nothing_and_a_broken_off_one_asks_the_rest(llava, data, tmp_path, monkeypatch):
    assert main(arguments(llava, data, tmp_path)) == 0
    whole = answers(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    lines = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:10])
    asked = []
    original = evaluate_model.answer

    def watched(model, processor, questions, **sizes):
        asked.extend(question.key for question in questions)
        return original(model, processor, questions, **sizes)

    monkeypatch.setattr(evaluate_model, "answer", watched)
    assert main(arguments(llava, data, tmp_path)) == 0
    assert len(asked) == len(whole) - 3
    assert answers(tmp_path).keys() == whole.keys()
    assert json.loads((tmp_path / "result.json").read_text())["questions"] == result["questions"]
    asked.clear()
    assert main(arguments(llava, data, tmp_path, "--metric", "vqa")) == 0
    assert asked == []


def test_another_model_precision_or_set_in_the_same_folder_is_refused(llava, data, tmp_path, capsys):
    assert main(arguments(llava, data, tmp_path)) == 0
    for option, value, name in (
        ("--precision", "fp32", "precision"),
        ("--images", data.parent, "images"),
        ("--processor", llava, "processor"),
        ("--on-bad-record", "skip", "on_bad_record"),
    ):
        assert main(arguments(llava, data, tmp_path, option, str(value))) == 2
        assert f"with another {name}" in capsys.readouterr().err
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").write_text("years of work")
    assert main(arguments(llava, data, tmp_path / "else")) == 2
    assert "holds something" in capsys.readouterr().err


def later(path):
    """As if the file had been written again, a second later."""
    time = path.stat().st_mtime
    os.utime(path, (time + 1, time + 1))


def test_every_file_of_a_model_that_is_read_decides_its_answers(llava, data, tmp_path, capsys):
    folder, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(llava, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "README.md").write_text("not read")
    assert main(arguments(folder, data, output)) == 0
    (folder / "README.md").write_text("not read either")
    (folder / "config.json").touch()  # another time, the same content
    assert main(arguments(folder, data, output)) == 0
    names = {path.name for path in folder.iterdir()} - {"README.md", "pytorch_model.bin"}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} < names
    for name in sorted(names):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept + b"\n")
        assert main(arguments(folder, data, output)) == 2
        assert capsys.readouterr().err.endswith(f"with another model_files/{name}\n")
        (folder / name).write_bytes(kept)
    later(folder / "pytorch_model.bin")
    assert main(arguments(folder, data, output)) == 2
    assert capsys.readouterr().err.endswith("with another model_files/pytorch_model.bin\n")


def test_a_processor_from_elsewhere_decides_answers_and_weights_beside_it_do_not(llava, data, tmp_path, capsys):
    shutil.copytree(llava, other := tmp_path / "other")
    again = arguments(llava, data, tmp_path / "out", "--processor", str(other))
    assert main(again) == 0
    later(other / "model.safetensors")
    assert main(again) == 0
    with (other / "chat_template.jinja").open("a") as file:
        file.write(" ")
    assert main(again) == 2
    assert capsys.readouterr().err.endswith("with another processor_files/chat_template.jinja\n")


def test_answers_about_other_pictures_are_refused_under_any_metric(llava, tmp_path, capsys, monkeypatch):
    data = write_llava(tmp_path / "data", 4, name="test.json")
    output = tmp_path / "out"
    assert main(arguments(llava, data, output)) == 0
    later(data)
    assert main(arguments(llava, data, output, "--metric", "vqa")) == 0
    monkeypatch.setattr(evaluate_model, "load_model", lambda *given, **more: pytest.fail("loaded"))
    record = next(asked.record for asked in read_questions(data) if asked.record.index == 2)
    later(record.images[0])
    for metric in ("exact", "vqa"):
        assert main(arguments(llava, data, output, "--metric", metric)) == 2
        assert capsys.readouterr().err.endswith(f"with another picture in record 2 ({record.id})\n")


def test_another_spelling_of_the_same_paths_is_the_same_evaluation(llava, data, tmp_path, monkeypatch):
    more = [["--images", str(path), "--processor", str(llava)] for path in (data.parent, ".")]
    assert main(arguments(llava, data, tmp_path, *more[0])) == 0
    before = answers(tmp_path)
    monkeypatch.setattr(evaluate_model, "load_model", lambda *given, **more: pytest.fail("loaded"))
    monkeypatch.chdir(data.parent)
    assert main(arguments(os.path.relpath(llava), data.name, tmp_path, *more[1])) == 0
    assert answers(tmp_path) == before


@pytest.mark.parametrize("text", ["[]", "{", "{}", '"text"', '{"model": "mine", "precision": "bf16"}'])
@pytest.mark.parametrize("name", ["settings.json", "config.json"])
def test_a_folder_of_something_else_is_refused_and_keeps_every_file(llava, data, tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text)
    assert main(arguments(llava, data, tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "output must be a new or empty folder, or one of gracekit evaluate" in line
    assert f"got {str(tmp_path)!r}, which holds something else" in line
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: text}


def test_a_file_as_output_is_refused(llava, data, tmp_path, capsys):
    (tmp_path / "out").write_text("a letter")
    assert main(arguments(llava, data, tmp_path / "out")) == 2
    assert f"got {str(tmp_path / 'out')!r}, which holds something else" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "a letter"


def test_answers_whose_kernel_is_not_known_any_more_are_judged_without_it(llava, data, tmp_path, capsys):
    assert main(arguments(llava, data, tmp_path)) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "kernel.json").unlink()
    assert main(arguments(llava, data, tmp_path)) == 0
    assert "; bf16, kernel unknown. Written" in capsys.readouterr().out
    again = json.loads((tmp_path / "result.json").read_text())
    assert (again["kernel"], again["scores"]) == (None, result["scores"])


def test_a_try_that_got_no_answer_does_not_block_its_folder(llava, data, tmp_path, capsys):
    """A mistyped model, then bad records, then the right command, all with one output."""
    records = json.loads(data.read_text())
    (data.parent / "bad.json").write_text(json.dumps([{"id": "x"}, *records]))
    output = tmp_path / "out"
    broken = tmp_path / "broken"
    shutil.copytree(llava, broken)
    (broken / "model.safetensors").unlink()
    assert main(arguments(broken, data, output)) == 2
    assert main(arguments(tmp_path / "mistyped", data, output)) == 2
    assert main(arguments(llava, data.parent / "bad.json", output)) == 2
    assert f"also in {output / 'bad_records.jsonl'}" in capsys.readouterr().err
    (output / "answers.jsonl").touch()  # as an interruption before the first answer leaves it
    assert main(arguments(llava, data, output)) == 0
    assert not (output / "bad_records.jsonl").exists()
    assert json.loads((output / "settings.json").read_text())["data"] == str(data)


def test_nothing_is_kept_of_a_line_that_was_being_written(tmp_path):
    settings = {"model": "m"}
    assert open_answers(tmp_path / "new", settings) == {}
    (tmp_path / "new" / "answers.jsonl").write_text('{"record": 0, "turn": 1, "answer": "re')
    assert open_answers(tmp_path / "new", settings) == {}
    assert (tmp_path / "new" / "answers.jsonl").read_text() == ""


def test_several_peoples_answers_come_from_the_record(tmp_path):
    (name, colour, _), *_ = write_pictures(tmp_path, 1)
    record = {"image": name, "conversations": turns("<image>\nWhat colour?", colour)}
    people = [colour] * 3 + [{"answer": "dark"}] * 7
    (tmp_path / "vqa.json").write_text(json.dumps([record | {"answers": people}]))
    (asked,) = read_questions(tmp_path / "vqa.json", None)
    assert asked.truths == (colour,) * 3 + ("dark",) * 7
    assert asked.score("vqa", colour) == pytest.approx(0.9)
    record["conversations"] += turns("And what shape?", "round")
    (tmp_path / "two.json").write_text(json.dumps([record | {"answers": people}]))
    with pytest.raises(ValueError, match="answers must be those to a record's one question, got 10 for 2"):
        read_questions(tmp_path / "two.json", None)


def bad_questions(data):
    """The set with four records more that are no questions: two cannot be read, one not encoded, one not judged."""
    special = {"conversations": turns("</s> what ?", "that")}
    answers = {"conversations": turns("what ?", "that"), "answers": 3}
    nameless = {"conversations": turns("what ?", "that"), "answers": [{"text": "that"}]}
    path = data.with_name("some-bad.json")
    path.write_text(json.dumps([{"id": "x"}, special, answers, nameless, *json.loads(data.read_text())]))
    return path


def test_skipped_records_are_said_counted_and_written(llava, data, tmp_path, capsys):
    assert main(arguments(llava, bad_questions(data), tmp_path / "out", "--on-bad-record", "skip")) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["records"], result["questions"]) == (10, len(read_questions(data)))
    kinds = {"no conversation": 1, "cannot be encoded": 1, "wrong answers": 2}
    assert result["bad_records"]["file"] == "bad_records.jsonl"
    assert (result["bad_records"]["count"], result["bad_records"]["kinds"]) == (4, kinds)
    lines = (tmp_path / "out" / "bad_records.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2, 3]
    assert (
        "4 of 10 records left out (2 wrong answers, 1 no conversation, 1 cannot be encoded), listed in"
        in capsys.readouterr().out
    )


def test_each_pass_over_the_records_says_beforehand_how_long_it_is_and_goes_to_its_end(data):
    passes = []
    read_questions(
        bad_questions(data),
        on_bad_record="skip",
        begin=lambda count: passes.append([count, 0]),
        advance=lambda count: passes[-1].__setitem__(1, passes[-1][1] + count),
    )
    assert passes == [[10, 10], [9, 9]]  # the record without a conversation is seen the first time


def test_bad_records_stop_with_all_of_them_before_the_model_is_loaded(llava, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_model, "load_model", lambda *given, **more: pytest.fail("loaded"))
    assert main(arguments(llava, bad_questions(data), tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert "got 4 bad of 10" in message
    assert all(f"record {index} (" in message for index in range(4))
    assert "answers must be a list of texts, got '3'" in message


def test_a_data_set_that_datasets_saved_asks_the_questions_of_its_file(llava, data, tmp_path):
    records = [one for one in json.loads(data.read_text()) if not isinstance(one.get("image"), list)]
    (listed := data.with_name("listed.json")).write_text(json.dumps(records))
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    for given, output in ((listed, "file"), (tmp_path / "saved", "set")):
        assert main(arguments(llava, given, tmp_path / output, "--images", str(data.parent))) == 0
    assert answers(tmp_path / "set") == answers(tmp_path / "file")
    datasets.Dataset.from_list(records[1:]).save_to_disk(tmp_path / "other")
    shutil.rmtree(tmp_path / "saved")
    shutil.move(tmp_path / "other", tmp_path / "saved")
    assert main(arguments(llava, tmp_path / "saved", tmp_path / "set", "--images", str(data.parent))) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metric", "choice"], "question must list its options"),
        (["--precision", "fake"], "needs learned scales"),
        (["--precision", "int4"], "int4-rtn rounds one"),
        (["--precision", "int4-rtn", "--group-size", "48"], "group_size must divide in_features, got group_size=48"),
        (
            ["--precision", "int4-rtn", "--group-size", "16"],
            "needs group_size in (32, 64, 128, 256), got group_size=16",
        ),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--data", "nowhere.json"], "nowhere.json"),
        (["--processor", "nowhere"], "processor must be a folder that is there, got 'nowhere'"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_model_is_read(llava, data, tmp_path, more, message, capsys, monkeypatch):
    monkeypatch.setattr("gracekit.recipe.answering.load", None)
    assert main(arguments(llava, data, tmp_path / "new", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new" / "answers.jsonl").exists()
