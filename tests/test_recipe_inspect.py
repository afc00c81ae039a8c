"""``gracekit inspect``: what is said of saved models of several families, from their configuration alone."""

import json

import pytest
import tiny_models
import torch
import transformers
from PIL import Image
from tiny_families import FAMILIES
from tokenizers import Tokenizer, models, pre_tokenizers

from gracekit.quant import LSQConfig, prepare_qat, quantize_rtn
from gracekit.quant.int4 import form_of
from gracekit.recipe.cli import main
from gracekit.recipe.inspect_model import build_on_meta, inspect_model
from gracekit.vlm import VisualTokenTap, language_linears

GROUPS_OF_32 = LSQConfig(group_size=32)


def saved(folder, model, *parts):
    """Config and processor files only: no weights."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path):
    Image.effect_noise((90, 60), 50).save(tmp_path / "x.png")
    return tmp_path / "x.png"


def tokenizer(**special):
    """Words 0 to 119, and then the placeholder with the id 120."""
    words = {str(i): i for i in range(119)} | {"<unk>": 119}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="0", **special)
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast


def image_processor(kind, **options):
    found = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    return found(**options)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_described_from_its_configuration_alone(name, tmp_path):
    model = FAMILIES[name].build()
    report = inspect_model(saved(tmp_path, model), config=GROUPS_OF_32)
    assert type(model).__name__ in report.lines["family"]
    assert report.lines["decoder"].endswith("4 layers, hidden size 32")
    assert "image 120" in report.lines["visual token id"]
    assert report.lines["tapped layer"].startswith("2 ")
    assert bool(report.problems) == (name == "qwen3_vl_moe")
    if report.problems:
        assert (
            "no nn.Linear and would stay in BF16, above all model.language_model.layers.0.mlp.experts"
            in report.problems[0]
        )


def test_the_model_is_built_without_memory(tmp_path):
    model = build_on_meta(saved(tmp_path, tiny_models.tiny_llava()))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_sizes_are_those_of_codes_and_scales(tmp_path):
    """Two blocks of 7 projections: 2-byte weights, then half a byte a weight and two for each group of 32."""
    model = tiny_models.tiny_llava(layers=2)
    names = prepare_qat(tiny_models.tiny_llava(layers=2), GROUPS_OF_32)
    count = sum(model.get_submodule(name).weight.numel() for name in names)
    report = inspect_model(saved(tmp_path, model), config=GROUPS_OF_32)
    assert report.lines["quantised"].startswith(f"{len(names)} linear layers (q_proj x 2, k_proj x 2")
    assert f"{count:,} weights" in report.lines["quantised"]
    assert report.lines["their size"].startswith(f"{count * 2 / 1024:.1f} KiB in BF16, {count * 9 / 16 / 1024:.1f} KiB")
    total = sum(p.numel() for p in model.parameters())
    assert report.lines["whole model"].startswith(f"{total * 2 / 1024:.1f} KiB in BF16")


def test_pictures_are_counted_by_the_folders_own_processor_and_by_the_models_features(tmp_path, picture):
    model = tiny_models.tiny_llava(vocab_size=128)
    images = image_processor("CLIPImageProcessor", size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    text = tokenizer()
    assert text.convert_tokens_to_ids("<image>") == 120
    processor = transformers.LlavaProcessor(
        images, text, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    report = inspect_model(saved(tmp_path / "m", model, processor), image=picture, config=GROUPS_OF_32)
    assert report.lines["visual tokens"] == "9 for x.png"
    assert report.lines["vocabulary"].startswith("128 classes, 7 of them padding: vocab_size=121")
    assert (report.notes, report.problems) == ([], [])
    processor.patch_size = 2
    report = inspect_model(saved(tmp_path / "w", model, processor), image=picture, config=GROUPS_OF_32)
    assert "writes 36 placeholders for x.png, but the model gives 9 features" in report.problems[0]


def test_the_grid_of_a_picture_is_what_the_tap_then_finds(tmp_path, picture):
    model = tiny_models.tiny_qwen2_vl()
    images = image_processor(
        "Qwen2VLImageProcessor", patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    report = inspect_model(saved(tmp_path, model, images), image=picture, config=GROUPS_OF_32)
    pixels = images(images=[Image.open(picture).convert("RGB")], return_tensors="pt")
    count = tiny_models.grid_tokens(pixels["image_grid_thw"][0].tolist())
    ids = torch.tensor([[122] + [120] * count + [123]])
    batch = {"input_ids": ids, "mm_token_type_ids": (ids == 120).int(), **pixels}
    with VisualTokenTap(model) as tap, torch.no_grad():
        model(**batch)
        assert tap.tokens(batch)[1] == [count]
    assert report.lines["visual tokens"].startswith(f"{count} (grid 1 x ")
    assert any("AutoProcessor cannot be used" in note for note in report.notes)


def test_a_picture_of_a_size_the_model_does_not_take_is_a_problem(tmp_path, picture):
    images = image_processor("CLIPImageProcessor")
    report = inspect_model(saved(tmp_path, tiny_models.tiny_llava(), images), image=picture, config=GROUPS_OF_32)
    assert report.lines["visual tokens"] == "not known for x.png"
    assert "the model refuses what its image processor gives: Input image size (224*224)" in report.problems[0]


def test_a_folder_without_a_processor_is_said_in_one_line_each(tmp_path, picture):
    report = inspect_model(saved(tmp_path, tiny_models.tiny_llava()), image=picture, config=GROUPS_OF_32)
    assert report.lines["visual tokens"] == "not known for x.png"
    assert [note.partition(" cannot")[0] for note in report.notes] == ["AutoProcessor", "AutoImageProcessor"]
    assert not any("\n" in note for note in report.notes)


def test_what_would_be_refused_is_named_beforehand(tmp_path):
    """prepare_qat refuses what the report says, and takes what it does not."""
    folder = saved(tmp_path, tiny_models.tiny_llava())
    (problem,) = inspect_model(folder).problems
    assert "group_size=128 does not divide in_features of 21 layers" in problem
    with pytest.raises(ValueError, match="group_size"):
        prepare_qat(tiny_models.tiny_llava(), LSQConfig())
    (problem,) = inspect_model(folder, config=LSQConfig(group_size=16)).problems
    assert "needs group_size in" in problem


@pytest.mark.parametrize("bits", [3, 8])
def test_a_width_without_a_kernel_works_and_is_noted(bits, tmp_path):
    """convert takes the reference form for it, in groups of any size."""
    config = LSQConfig(bits=bits, group_size=16)
    report = inspect_model(saved(tmp_path, tiny_models.tiny_llava()), config=config)
    assert report.problems == []
    assert report.notes == [
        f"INT{bits} has no kernel: its weights are multiplied out on the fly, no faster than the plain model"
    ]
    assert form_of(language_linears(quantize_rtn(tiny_models.tiny_llava(), config)).popitem()[1]) == "reference"


def test_a_picture_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, picture, capsys):
    folder = saved(tmp_path / "m", tiny_models.tiny_llava())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (tmp_path / "text.png").write_text("no picture")
    for path, said in (
        (picture, "could be decompression bomb"),
        (tmp_path / "text.png", "broken image"),
        (tmp_path / "none.png", "missing image"),
        (tmp_path, "broken image"),
    ):
        assert main(["inspect", str(folder), "--image", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("gracekit inspect: error: ")
        assert said in error
        assert str(path) in error
        assert error.count("\n") == 1


def test_a_text_model_has_no_visual_tokens(tmp_path):
    config = transformers.LlamaConfig(vocab_size=32, **tiny_models.text_size(32, 2))
    report = inspect_model(saved(tmp_path, transformers.LlamaForCausalLM(config)), config=GROUPS_OF_32)
    assert report.lines["visual token id"] == "none"
    assert "visual tokens cannot be tapped: model must be a vision-language model" in report.problems[0]


def test_the_command_prints_the_report_or_one_line(tmp_path, capsys):
    folder = saved(tmp_path / "model", tiny_models.tiny_llava())
    assert main(["inspect", str(folder), "--group-size", "32"]) == 0
    assert "family           llava (LlavaForConditionalGeneration)" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "gracekit inspect: error: MODEL_DIR must hold a config.json" in capsys.readouterr().err
    assert main(["inspect", str(folder), "--bits", "9"]) == 2
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "llama", "architectures": ["Nobody"]}')
    assert main(["inspect", str(tmp_path / "odd")]) == 2
    assert "architectures=['Nobody']" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "quantize"])
@pytest.mark.parametrize("names", ['"LlamaForCausalLM"', "[3]", '{"a": 1}'])
def test_architectures_are_a_list_of_names(command, names, tmp_path, capsys):
    (tmp_path / "config.json").write_text(f'{{"model_type": "llama", "architectures": {names}}}')
    more = ["--format", "torchao"] if command == "quantize" else []
    assert main([command, str(tmp_path), *more]) == 2
    expected = f"architectures must be a list of names in config.json, got {json.loads(names)!r} in {tmp_path}"
    assert capsys.readouterr().err == f"gracekit {command}: error: {expected}\n"


@pytest.mark.parametrize("command", ["inspect", "quantize"])
@pytest.mark.parametrize("text", ["[]", "3", '"text"'])
def test_a_configuration_that_is_no_object_is_one_line(command, text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    more = ["--format", "torchao"] if command == "quantize" else []
    assert main([command, str(tmp_path), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gracekit {command}: error: ")
    assert error.count("\n") == 1


def test_a_model_that_is_quantised_already_is_a_problem(tmp_path):
    tiny_models.tiny_llava(layers=1).save_pretrained(tmp_path / "plain")
    output = tmp_path / "int4"
    command = ["quantize", str(tmp_path / "plain"), "--format", "compressed-tensors", "--group-size", "32"]
    assert main([*command, "--output", str(output)]) == 0
    problems = inspect_model(output).problems
    assert any("is quantised already (compressed-tensors)" in problem for problem in problems)
