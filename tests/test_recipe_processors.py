"""A conversation as a model reads it, and which of its tokens are the assistant's; transformers' own output is the judge."""

import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from conversation_cases import FAMILIES, LLAVA_TEMPLATE, QWEN_TEMPLATE, byte_tokenizer, drawing, save_pair
from hypothesis import given
from hypothesis import strategies as st

from gracekit.recipe.conversations import Turn
from gracekit.recipe.processors import load_processor

PICTURES = [drawing(number, (40 + 12 * number, 28))[0] for number in range(3)]
ENDS = {"llava": "</s>", "llava_next": "</s>", "qwen2_vl": "<|im_end|>", "qwen3_vl": "<|im_end|>"}
MARKED = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] }}{% endgeneration %}</s>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ ' (last)' if loop.last }} {% endfor %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_pair(tmp_path_factory.mktemp(name), name, layers=2) for name in FAMILIES}


@pytest.fixture(scope="module")
def processors(folders):
    return {name: load_processor(folder) for name, folder in folders.items()}


def said(*texts):
    return [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def answers(processor, encoded):
    """What each run of supervised tokens decodes to."""
    runs, run = [], []
    for label in [*encoded["labels"].tolist(), -100]:
        if label != -100:
            run.append(label)
        elif run:
            runs.append(processor.tokenizer.decode(run))
            run = []
    return runs


def messages(turns):
    """The same conversation as transformers takes it, written down independently of the code under test."""
    made = []
    for turn in turns:
        pieces = re.split("(<image>)", re.sub(r"\n*<image>\n*", "<image>", turn.text))
        parts = [{"type": "image"} if piece == "<image>" else {"type": "text", "text": piece} for piece in pieces]
        made.append({"role": turn.role, "content": [part for part in parts if part.get("text") != ""]})
    return made


def count_images(turns):
    return sum(turn.text.count("<image>") for turn in turns)


LETTERS = st.text(st.sampled_from('ab the\n.éж漢🙂"{%'), min_size=1, max_size=12)
ANSWERS = LETTERS.map(str.strip).filter(bool)
MARKS = st.lists(st.just("<image>\n"), max_size=2).map("".join)
CONVERSATIONS = st.lists(st.tuples(MARKS, LETTERS, ANSWERS), min_size=1, max_size=3).map(
    lambda asked: said(*(text for marks, question, answer in asked for text in (marks + question, answer)))
)


@pytest.mark.parametrize("family", FAMILIES)
@given(turns=CONVERSATIONS, system=st.booleans())
def test_labels_are_the_assistants_words_and_their_ends(family, processors, turns, system):
    turns = [*([Turn("system", "Be short.")] if system else []), *turns]
    processor = processors[family]
    encoded = processor.encode(turns, [PICTURES[i % 3] for i in range(count_images(turns))])
    ids, labels = encoded["input_ids"], encoded["labels"]
    assert torch.equal(labels[labels >= 0], ids[labels >= 0])
    expected = [turn.text + ENDS[family] for turn in turns if turn.role == "assistant"]
    assert [text.lstrip(" ") for text in answers(processor, encoded)] == expected


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@given(turns=CONVERSATIONS)
def test_input_is_what_the_models_own_processor_makes(family, folders, processors, turns):
    """Of the whole conversation, but for the end tokens that LLaVA's template leaves out; of its prompt, exactly."""
    own = transformers.AutoProcessor.from_pretrained(folders[family])
    images = [PICTURES[i % 3] for i in range(count_images(turns))]
    for given_turns, prompt in ((turns, False), (turns[:-1], True)):
        text = own.apply_chat_template(messages(given_turns), add_generation_prompt=prompt)
        expected = own(images=images or None, text=[text], return_tensors="pt")
        encoded = processors[family].encode(given_turns, images, add_generation_prompt=prompt)
        ids = encoded.pop("input_ids")
        assert torch.equal(ids[ids != own.tokenizer.eos_token_id], expected.pop("input_ids")[0])
        assert ids.tolist().count(own.tokenizer.eos_token_id) == sum(t.role == "assistant" for t in given_turns)
        del expected["attention_mask"], encoded["labels"]
        assert expected.keys() == encoded.keys()
        assert all(torch.equal(encoded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@given(turns=CONVERSATIONS)
def test_qwens_input_follows_the_rule_of_its_processor(family, processors, turns):
    """Each placeholder becomes grid.prod() / merge**2 of them; text, template and pixels are transformers' own."""
    processor = processors[family]
    images = [PICTURES[i % 3] for i in range(count_images(turns))]
    encoded = processor.encode(turns, images)
    text = processor.tokenizer.apply_chat_template(messages(turns), chat_template=QWEN_TEMPLATE, tokenize=False)
    if images:
        pixels = processor.image_processor(images=images, return_tensors="pt")
        for grid in pixels["image_grid_thw"]:
            text = text.replace("<|image_pad|>", "<placeholder>" * int(grid.prod() // 4), 1)
        assert torch.equal(encoded["pixel_values"], pixels["pixel_values"])
        assert torch.equal(encoded["image_grid_thw"], pixels["image_grid_thw"])
    expected = processor.tokenizer(text.replace("<placeholder>", "<|image_pad|>"))["input_ids"]
    assert encoded["input_ids"].tolist() == expected
    placeholder = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert torch.equal(encoded["mm_token_type_ids"], (encoded["input_ids"] == placeholder).int())


def test_the_real_qwen_processor_agrees_where_it_can_be_imported(folders, processors):
    pytest.importorskip("torchvision")
    own = transformers.AutoProcessor.from_pretrained(folders["qwen2_vl"])
    turns = said("<image>what ?", "that")
    text = own.apply_chat_template(messages(turns), tokenize=False)
    expected = own(images=PICTURES[:1], text=[text], return_tensors="pt")
    assert torch.equal(processors["qwen2_vl"].encode(turns, PICTURES[:1])["input_ids"], expected["input_ids"][0])


def test_a_prompt_is_the_beginning_of_the_conversation(processors):
    turns = said("<image>\nWhat ?", "a red one", "and ?", "none")
    for processor in processors.values():
        whole = processor.encode(turns, PICTURES[:1])["input_ids"]
        for count in (1, 3):
            prompt = processor.encode(turns[:count], PICTURES[:1], add_generation_prompt=True)
            assert torch.equal(whole[: len(prompt["input_ids"])], prompt["input_ids"])
            assert len(answers(processor, prompt)) == count // 2


def test_without_a_template_conversations_are_written_as_for_llava(tmp_path):
    processor = load_processor(save_pair(tmp_path / "m", "llava", chat_template=False))
    encoded = processor.encode(
        [Turn("system", "Hello."), *said("<image>\nWhat ?", "a cup", "So ?", "yes")], PICTURES[:1]
    )
    written = processor.tokenizer.decode(encoded["input_ids"]).replace("<image>" * 9, "<image>")
    assert written == "<s>Hello. USER: <image>\nWhat ? ASSISTANT: a cup</s>USER: So ? ASSISTANT: yes</s>"
    assert answers(processor, encoded) == [" a cup</s>", " yes</s>"]


def test_a_saved_processor_writes_the_same_again(tmp_path):
    turns = said("<image>\nWhat ?", "a cup")
    for family, template in (("llava", False), ("qwen3_vl", True)):
        first = load_processor(save_pair(tmp_path / family, family, chat_template=template))
        first.save_pretrained(tmp_path / f"{family}-again")
        folder = tmp_path / f"{family}-again"
        transformers.AutoConfig.from_pretrained(tmp_path / family).save_pretrained(folder)
        again = load_processor(folder)
        assert again.chat_template == first.chat_template
        one, other = first.encode(turns, PICTURES[:1]), again.encode(turns, PICTURES[:1])
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_template_in_a_file_of_its_own_is_found(tmp_path):
    """The first releases of Qwen2-VL have it in chat_template.json."""
    folder = tmp_path / "m"
    with_it = load_processor(save_pair(folder, "qwen2_vl"))
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": QWEN_TEMPLATE}))
    assert load_processor(folder).chat_template == with_it.chat_template


def test_an_image_processor_described_inside_the_processors_file_is_found(tmp_path):
    folder = tmp_path / "m"
    before = load_processor(save_pair(folder, "qwen2_vl"))
    described = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": described}))
    (folder / "preprocessor_config.json").unlink()
    assert load_processor(folder).image_processor.to_dict() == before.image_processor.to_dict()


def with_template(folders, template, family="llava"):
    processor = load_processor(folders[family])
    processor.chat_template = template
    return processor


def test_a_template_that_rewrites_earlier_turns_needs_marks(folders):
    processor = with_template(folders, MARKED)
    encoded = processor.encode(said("<image>What ?", "a cup", "So ?", "yes"), PICTURES[:1])
    assert [text.lstrip(" ") for text in answers(processor, encoded)] == ["a cup</s>", "yes</s>"]
    without = re.sub("{% (end)?generation %}", "", MARKED)
    with pytest.raises(ValueError, match=r"chat template of .* cannot be used: it must write the beginning"):
        with_template(folders, without).encode(said("What ?", "a cup", "So ?", "yes"), [])


def test_a_template_may_end_turns_with_plain_text(folders):
    ending = "{% if message['role'] == 'assistant' %}###\n{% endif %}"
    plain = LLAVA_TEMPLATE.replace("{% endfor %}{% if add", ending + "{% endfor %}{% if add")
    encoded = with_template(folders, plain).encode(said("What ?", "a cup", "So ?", "yes"), [])
    assert answers(with_template(folders, plain), encoded) == [" a cup ###", " yes ###"]


def test_a_template_that_changes_answers_or_drops_images_is_refused(folders):
    shouting = LLAVA_TEMPLATE.replace("content['text'] +", "content['text'] | upper +")
    with pytest.raises(ValueError, match="must write what the assistant says as it is, got ' YES"):
        with_template(folders, shouting).encode(said("So ?", "yes"), [])
    choosy = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + LLAVA_TEMPLATE
    )
    with pytest.raises(ValueError, match="cannot be used: no system turns"):
        with_template(folders, choosy).encode([Turn("system", "Hello."), *said("So ?", "yes")], [])
    blind = LLAVA_TEMPLATE.replace("<image>", "")
    with pytest.raises(ValueError, match="must write '<image>' for each image, got 0 for 1 images"):
        with_template(folders, blind).encode(said("<image>So ?", "yes"), PICTURES[:1])


def test_special_tokens_in_what_is_said_are_refused(processors):
    for family, token in (("llava", "</s>"), ("qwen2_vl", "<|im_end|>"), ("qwen3_vl", "<|image_pad|>")):
        for turns in (said(f"a {token}", "b"), said("a", f"b {token} c")):
            with pytest.raises(ValueError, match=re.escape(f"special tokens of the tokenizer, got '{token}'")):
                processors[family].encode(turns, [])


def test_markers_and_images_must_be_as_many(processors):
    with pytest.raises(ValueError, match="got 1 for 2 images"):
        processors["llava"].encode(said("<image>a", "b"), PICTURES[:2])


def test_threads_encode_alike(processors):
    turns = said("<image>\nWhat ?", "a cup")
    for processor in processors.values():
        alone = processor.encode(turns, PICTURES[:1])
        with ThreadPoolExecutor(4) as pool:
            found = [pool.submit(processor.encode, turns, PICTURES[:1]) for _ in range(16)]
        for other in found:
            assert all(torch.equal(alone[name], other.result()[name]) for name in alone)


def test_a_processor_goes_to_another_process(processors):
    turns = said("<image>\nWhat ?", "a cup")
    for processor in processors.values():
        one, other = (p.encode(turns, PICTURES[:1]) for p in (processor, pickle.loads(pickle.dumps(processor))))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_folders_that_lack_a_part_are_refused(tmp_path, folders):
    with pytest.raises(OSError, match="none"):
        load_processor(tmp_path / "none")
    text = byte_tokenizer(("<|image_pad|>", "<e>"), eos="<e>", pad="<e>")
    text.save_pretrained(tmp_path / "m")
    config = transformers.AutoConfig.from_pretrained(folders["qwen2_vl"])
    config.save_pretrained(tmp_path / "m")
    with pytest.raises(OSError, match="preprocessor_config"):
        load_processor(tmp_path / "m")
