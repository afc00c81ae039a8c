"""Tiny data sets of conversations about drawn pictures, and tiny pairs on disk: model, tokenizer, chat template, image processor.

``save_pair(folder, "qwen2_vl")`` writes a folder that ``load_processor`` and ``AutoModelForImageTextToText`` read;
``write_llava(folder, 8)`` writes pictures and a train.json about them.
"""

import json

import tiny_families
import transformers
from PIL import Image, ImageDraw
from tiny_models import tiny_llava, tiny_qwen2_vl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 30), "blue": (40, 60, 220)}
SHAPES = ("circle", "square")

LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen3_vl")


def byte_tokenizer(special, *, bos=None, eos, pad, merges=("t h", "th e", "Ġ a", "i n")):
    """A byte-level BPE: any text goes in and comes out again."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *("".join(merge.split()) for merge in merges)]
    pairs = [tuple(merge.split()) for merge in merges]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    names = {"bos_token": bos} if bos is not None else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        **names,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=[token for token in special if token not in (bos, eos, pad)],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def image_processor(kind, **options):
    """The one that works with Pillow; its name changed between versions of transformers."""
    found = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    return found(**options)


def clip_images(kind="CLIPImageProcessor", **more):
    return image_processor(kind, size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}, **more)


def save_pair(folder, family, *, seed=0, width=32, layers=3, vocab_size=304, chat_template=True):
    """Save a tiny random model with all that reads its input, and return the folder as a string.

    ``vocab_size`` is that of the output head, at least the tokenizer's 270 or so; two sizes make a pair with different padding.
    """
    make = _llava if family.startswith("llava") else _qwen
    make(folder, family, chat_template, seed=seed, width=width, layers=layers, vocab_size=vocab_size)
    return str(folder)


def _llava(folder, family, chat_template, *, layers, **size):
    text = byte_tokenizer(("<pad>", "<s>", "</s>", "<image>"), bos="<s>", eos="</s>", pad="<pad>")
    image_id = text.convert_tokens_to_ids("<image>")
    options = {
        "patch_size": 4,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": LLAVA_TEMPLATE if chat_template else None,
    }
    if family == "llava":
        model = tiny_llava(image_token_id=image_id, layers=layers, **size)
        processor = transformers.LlavaProcessor(clip_images(), text, **options)
    else:
        model = tiny_families.FAMILIES["llava_next"].build(layers=layers, **size)
        pinpoints = [[12, 24], [24, 12], [24, 24]]
        model.config.image_token_id = model.config.image_token_index = image_id
        model.config.image_grid_pinpoints = pinpoints
        images = clip_images("LlavaNextImageProcessor", image_grid_pinpoints=pinpoints)
        processor = transformers.LlavaNextProcessor(images, text, **options)
    model.config.text_config.eos_token_id = text.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _qwen(folder, family, chat_template, *, layers, **size):
    text = byte_tokenizer(QWEN_SPECIAL, eos="<|im_end|>", pad="<|endoftext|>")
    ids = {
        f"{name}_token_id": text.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in {
            "image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end",
        }.items()
    }  # fmt: skip
    if family == "qwen2_vl":
        model = tiny_qwen2_vl(layers=layers, **size)
    else:
        model = tiny_families.FAMILIES["qwen3_vl"].build(layers=layers, **size)
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.config.text_config.eos_token_id = text.eos_token_id
    images = image_processor(
        "Qwen2VLImageProcessor", patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    if chat_template:
        text.chat_template = QWEN_TEMPLATE
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    text.save_pretrained(folder)


def drawing(number, size=(40, 28)):
    """One picture of a coloured shape, and its (colour, shape)."""
    colour, shape = list(COLOURS)[number % 3], SHAPES[number // 3 % 2]
    picture = Image.new("RGB", size, (235, 235, 225))
    box = [size[0] // 4, size[1] // 4, size[0] // 4 + size[1] // 2, size[1] // 4 + size[1] // 2]
    draw = ImageDraw.Draw(picture)
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=COLOURS[colour])
    return picture, colour, shape


def write_pictures(folder, count):
    """Save pictures of several sizes below ``folder``; a list of (relative name, colour, shape)."""
    found = []
    for number in range(count):
        picture, colour, shape = drawing(number, (40 + 8 * (number % 3), 28 + 4 * (number % 2)))
        name = f"images/{number}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)
        found.append((name, colour, shape))
    return found


def turns(*texts):
    """Human and assistant in turn, as the LLaVA format has them."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def llava_records(pictures):
    """One record each: two turns about the picture; every fourth about two pictures, every fifth about none."""
    records = []
    for number, (name, colour, shape) in enumerate(pictures):
        record = {"id": f"r{number}"}
        if number % 5 == 4:
            record["conversations"] = turns("What is two and two?", "four")
        elif number % 4 == 3:
            other = pictures[number - 1]
            record["image"] = [name, other[0]]
            record["conversations"] = turns("<image>\n<image>\nWhich colours?", f"{colour} and {other[1]}")
        else:
            record["image"] = name
            record["conversations"] = turns(
                "<image>\nWhat colour is it?", colour, "And what shape?", f"It is a {shape}."
            )
        records.append(record)
    return records


def vqa_records(pictures):
    """One picture and two questions each, as the small recipe takes them."""
    return [
        {
            "id": str(number),
            "image": name,
            "conversations": turns("<image>\nwhat colour is it ?", colour, "what shape is it ?", shape),
        }
        for number, (name, colour, shape) in enumerate(pictures)
    ]


def write_llava(folder, count, *, name="train.json", records=llava_records):
    """Write pictures and conversations about them; a name that ends in .jsonl gives a line a record. Returns the file's path."""
    made = records(write_pictures(folder, count))
    path = folder / name
    lines = name.endswith(".jsonl")
    path.write_text("".join(json.dumps(r) + "\n" for r in made) if lines else json.dumps(made), encoding="utf-8")
    return path
