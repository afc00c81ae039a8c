"""``gracekit generate``: plain, rounded, packed and trained folders answer as transformers' own generate does."""

import io
import sys

import conversation_cases
import pytest
import torch
import transformers
from PIL import Image

from gracekit.quant import LSQConfig, convert, prepare_qat, save_qat
from gracekit.recipe.answering import load_model, precision_of
from gracekit.recipe.cli import main
from gracekit.recipe.data import load_easy_vqa
from gracekit.recipe.generate import answer
from gracekit.recipe.models import load_teacher
from gracekit.recipe.processors import load_processor
from gracekit.recipe.record_format import Turn
from gracekit.recipe.student_files import save_student

CPU = torch.device("cpu")
GROUPS_OF_32 = LSQConfig(group_size=32)


@pytest.fixture
def picture(tmp_path):
    conversation_cases.drawing(1)[0].save(tmp_path / "x.png")
    return tmp_path / "x.png"


def by_transformers(model, processor, text, images, count):
    batch = processor.encode([Turn(role="user", text=text)], images, add_generation_prompt=True)
    del batch["labels"]
    length = len(batch["input_ids"])
    batch = {
        name: (value[None] if value.shape == (length,) else value).to(
            model.dtype if value.is_floating_point() else None
        )
        for name, value in batch.items()
    }
    ends = processor.tokenizer.eos_token_id
    ids = model.generate(**batch, max_new_tokens=count, do_sample=False, eos_token_id=ends, pad_token_id=0)
    return processor.tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl"])
def test_an_answer_is_what_transformers_generates(family, tmp_path, picture):
    folder = conversation_cases.save_pair(tmp_path / "m", family)
    model, processor = load_model(tmp_path / "m", "fp32", CPU), load_processor(folder)
    said = answer(model, processor, "What is it?", [picture, picture], max_new_tokens=6)
    assert said.text == by_transformers(model, processor, "<image>\n<image>\nWhat is it?", [picture, picture], 6)
    assert int(said.generation.new_tokens) == 6


def test_images_stand_where_the_prompt_says(tmp_path, picture):
    processor = load_processor(conversation_cases.save_pair(tmp_path / "m", "llava"))
    model = load_model(tmp_path / "m", "fp32", CPU)
    prompt = "First <image> and then?"
    said = answer(model, processor, prompt, [picture], max_new_tokens=3)
    assert said.text == by_transformers(model, processor, prompt, [picture], 3)
    with pytest.raises(ValueError, match="got 1 for 2 images"):
        answer(model, processor, prompt, [picture, picture], max_new_tokens=3)


def test_sampling_depends_on_the_seed_alone(tmp_path):
    processor = load_processor(conversation_cases.save_pair(tmp_path / "m", "llava"))
    model = load_model(tmp_path / "m", "fp32", CPU)
    texts = [
        answer(
            model, processor, "What?", [], max_new_tokens=8, temperature=2.0, seed=seed
        ).generation.sequences.tolist()
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_kind_of_a_folder_is_seen_in_its_files(tmp_path):
    plain = tmp_path / "plain"
    conversation_cases.save_pair(plain, "llava")
    assert [precision_of(plain, int4=int4) for int4 in (False, True)] == ["bf16", "int4-rtn"]
    model = transformers.LlavaForConditionalGeneration.from_pretrained(plain)
    prepare_qat(model, GROUPS_OF_32)
    save_qat(model, tmp_path / "trained")
    assert precision_of(tmp_path / "trained", int4=False) == "int4"
    convert(model, "portable").save_pretrained(tmp_path / "packed")
    assert precision_of(tmp_path / "packed", int4=False) == "int4"
    wide = transformers.LlavaForConditionalGeneration.from_pretrained(plain)
    prepare_qat(wide, LSQConfig(bits=8, group_size=32))
    save_qat(wide, tmp_path / "wide")
    convert(wide, "reference").save_pretrained(tmp_path / "reference")
    assert [precision_of(tmp_path / name) for name in ("wide", "reference")] == ["int8", "int8"]
    settings = (tmp_path / "packed" / "config.json").read_text().replace('"torchao"', '"awq"')
    (tmp_path / "packed" / "config.json").write_text(settings)
    with pytest.raises(ValueError, match="got 'awq'"):
        precision_of(tmp_path / "packed", int4=False)


def test_the_command_answers_from_plain_rounded_trained_and_packed_folders(tmp_path, picture, capsys):
    plain = tmp_path / "plain"
    conversation_cases.save_pair(plain, "qwen2_vl")
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(plain).bfloat16()
    prepare_qat(model, GROUPS_OF_32)
    save_qat(model, tmp_path / "trained")
    convert(model, "portable", dtype=torch.bfloat16).to(torch.bfloat16).save_pretrained(tmp_path / "packed")
    more = ["--image", str(picture), "--prompt", "What is it?", "--max-new-tokens", "4", "--processor", str(plain)]
    printed = {}
    for name, options in {
        "plain": [],
        "rounded": ["--int4", "--group-size", "32"],
        "trained": [],
        "packed": [],
    }.items():
        folder = plain if name == "rounded" else tmp_path / name
        assert main(["generate", str(folder), *options, *more]) == 0
        printed[name] = capsys.readouterr().out.rstrip("\n").split("\n")
        assert "tokens/s; peak memory" in printed[name][-1]
    assert printed["plain"][-1].endswith("torch")
    assert all("Int4OpaqueTensor" in printed[name][-1] for name in ("rounded", "trained", "packed"))
    assert printed["trained"][:-1] == printed["packed"][:-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["torchao", "torchao-reference"])
def test_what_quantize_wrote_of_any_dtype_is_answered_from(tmp_path, picture, form, dtype, capsys):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    conversation_cases.save_pair(plain, "llava")
    transformers.LlavaForConditionalGeneration.from_pretrained(plain).to(dtype).save_pretrained(plain)
    assert main(["quantize", str(plain), "--format", form, "--group-size", "32", "--output", str(packed)]) == 0
    more = ["--image", str(picture), "--prompt", "What is it?", "--max-new-tokens", "3"]
    assert main(["generate", str(packed), *more]) == 0
    assert "Int4OpaqueTensor" in capsys.readouterr().out
    expected = torch.float16 if dtype == torch.float16 else torch.bfloat16
    assert load_model(packed, "int4", CPU).dtype == expected


def test_scales_trained_in_float16_are_answered_with(tmp_path):
    conversation_cases.save_pair(tmp_path / "plain", "llava")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "plain")
    prepare_qat(model, LSQConfig(group_size=32, scale_dtype=torch.float16))
    save_qat(model, tmp_path / "trained")
    assert load_model(tmp_path / "trained", "int4", CPU).dtype == torch.float16


def test_the_packaged_teacher_answers_questions_about_its_pictures(tmp_path):
    """In INT4, from a folder as a run of the recipe leaves it."""
    model, tokenizer = load_teacher("")
    prepare_qat(model, GROUPS_OF_32)
    save_student(model, tokenizer, tmp_path / "m")
    split = load_easy_vqa("test", 4)
    processor, model = load_processor(tmp_path / "m"), load_model(tmp_path / "m", "int4", CPU)
    asked = [question for question in split.questions if question.image < 4][:12]
    right = 0
    for question in asked:
        Image.fromarray(split.images[question.image].permute(1, 2, 0).numpy()).save(tmp_path / "q.png")
        right += answer(model, processor, question.text, [tmp_path / "q.png"], max_new_tokens=3).text == question.answer
    assert right >= len(asked) - 1


def test_what_cannot_be_done_is_one_line(tmp_path, picture, capsys):
    folder = conversation_cases.save_pair(tmp_path / "m", "llava")
    for arguments, said in (
        ([str(tmp_path)], "got no config.json"),
        ([folder, "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        ([folder, "--temperature", "-1"], "temperature must be finite and in [0, inf]"),
        ([folder, "--temperature", "1e-40"], "temperature must be 0 or at least 0.001, got 1e-40"),
        ([folder, "--max-new-tokens", "9999"], "max_length must be at most the model's 256 positions"),
        ([folder, "--image", str(tmp_path / "none.png")], "none.png"),
        ([folder, "--int4"], "group_size must divide in_features, got group_size=128"),
        ([folder, "--int4", "--group-size", "16"], "needs group_size in (32, 64, 128, 256), got group_size=16"),
        ([folder, "--seed", "99999999999999999999"], "seed must be at least"),
        ([folder, "--processor", str(tmp_path / "none")], "processor must be a folder that is there"),
        ([folder, "--prompt", "caf\udce9"], "prompt must be Unicode text, got '\\udce9' at 3"),
    ):
        assert main(["generate", "--prompt", "What?", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("gracekit generate: error: ")
        assert said in error


def test_a_picture_that_cannot_be_read_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    folder = conversation_cases.save_pair(tmp_path / "m", "llava")
    (tmp_path / "text.png").write_text("no picture")
    monkeypatch.setattr("gracekit.recipe.generate.load_model", lambda *given, **more: pytest.fail("loaded"))
    assert main(["generate", folder, "--prompt", "What?", "--image", str(tmp_path / "text.png")]) == 2
    assert f"broken image: {tmp_path / 'text.png'}" in capsys.readouterr().err


def test_an_answer_is_printed_whatever_the_encoding_of_the_terminal(tmp_path, monkeypatch):
    folder = conversation_cases.save_pair(tmp_path / "m", "llava")
    said = answer(load_model(tmp_path / "m", "fp32", CPU), load_processor(folder), "What?", [], max_new_tokens=1)
    monkeypatch.setattr(
        "gracekit.recipe.generate.answer", lambda *given, **more: said._replace(text="caf\u00e9 \u732b")
    )
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert main(["generate", folder, "--prompt", "What?"]) == 0
    sys.stdout.flush()
    assert printed.getvalue().startswith(b"caf\\xe9 \\u732b\n")
