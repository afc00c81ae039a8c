"""VisualTokenPair: both models' tokens, matched image by image, into the relational loss."""

import copy

import pytest
import tiny_models
import torch
from tiny_families import FAMILIES
from tolerances import GRADIENT

from gracekit import RelationalCKA
from gracekit.vlm import VisualTokenPair, VisualTokenTap, pool_tokens

SAMPLES = ["tIIt", "It", "tt"]


def with_id(batch, old, new):
    return {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == old, new)}


def run(pair, student, teacher, batch, taught, **grids):
    student(**batch, use_cache=False)
    with torch.no_grad():
        teacher(**taught)
    return pair.tokens(batch, taught, **grids)


@pytest.fixture(scope="module")
def llavas():
    teacher = tiny_models.tiny_llava(seed=1, width=48, layers=5, vocab_size=160, image_token_id=140)
    return tiny_models.tiny_llava(), teacher


@pytest.fixture(scope="module")
def qwens():
    return tiny_models.tiny_qwen2_vl(), tiny_models.tiny_qwen2_vl(seed=1, width=32, layers=4)


def llava_batches(student, samples=SAMPLES):
    batch = tiny_models.llava_batch(student, samples)
    return batch, with_id(batch, 120, 140)


def test_the_pair_gives_what_two_taps_give(llavas):
    student, teacher = llavas
    batch, taught = llava_batches(student)
    with VisualTokenPair(student, teacher) as pair, VisualTokenTap(student) as one, VisualTokenTap(teacher) as other:
        tokens = run(pair, student, teacher, batch, taught)
        assert torch.equal(tokens.student, one.tokens(batch)[0])
        assert torch.equal(tokens.teacher, other.tokens(taught)[0])
    assert tokens.lengths == [9, 9, 9]
    assert (tokens.student.shape, tokens.teacher.shape) == ((27, 32), (27, 48))


def test_the_relational_loss_trains_the_student_and_not_the_teacher(llavas):
    student, teacher = llavas
    batch, taught = llava_batches(student)
    student.zero_grad()
    with VisualTokenPair(student, teacher) as pair:
        student(**batch, use_cache=False)
        teacher(**taught, use_cache=False)  # with gradients: the pair lets go of them
        tokens = pair.tokens(batch, taught)
    RelationalCKA()(*tokens).backward()
    assert student.get_decoder().layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert student.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert not tokens.teacher.requires_grad
    assert all(p.grad is None for p in teacher.parameters())


def test_one_batch_serves_both_models_of_one_vocabulary(qwens):
    student, teacher = qwens
    batch = tiny_models.qwen2_vl_batch(student, ["tIIt", "IVt"])
    with VisualTokenPair(student, teacher) as pair:
        student(**batch)
        teacher(**batch)
        assert pair.tokens(batch).lengths == [4, 6, 8, 8]


def test_layers_may_differ(llavas):
    student, teacher = llavas
    batch, taught = llava_batches(student)
    with VisualTokenPair(student, teacher, 0, teacher_layer=3) as pair, VisualTokenTap(teacher, 3) as tap:
        tokens = run(pair, student, teacher, batch, taught)
        assert torch.equal(tokens.teacher, tap.tokens(taught)[0])
    assert repr(pair) == (
        "VisualTokenPair(LlavaForConditionalGeneration, LlavaForConditionalGeneration, layer=0, teacher_layer=3, pool=False)"
    )


def test_a_difference_in_tokens_names_the_image_and_both_counts(qwens, monkeypatch):
    student, teacher = qwens
    batch = tiny_models.qwen2_vl_batch(student, ["tIIt", "It"])  # 4, 6 and 8 tokens
    monkeypatch.setattr(tiny_models, "GRIDS", [(1, 4, 4), (1, 8, 8), (1, 8, 4)])
    taught = tiny_models.qwen2_vl_batch(teacher, ["tIIt", "It"])
    with VisualTokenPair(student, teacher) as pair, pytest.raises(ValueError, match="got 6 and 16 for image 1 of 3;"):
        run(pair, student, teacher, batch, taught)


def test_a_difference_in_images_names_both_counts(llavas):
    student, teacher = llavas
    batch, _ = llava_batches(student)
    _, taught = llava_batches(student, ["tI"])
    with (
        VisualTokenPair(student, teacher) as pair,
        pytest.raises(ValueError, match="same images, got 3 images in the student's batch and 1 in the teacher's"),
    ):
        run(pair, student, teacher, batch, taught)


def test_pooling_takes_the_grids_from_the_batches(qwens, monkeypatch):
    """Student grids 2x2, 2x3, 4x2 against the teacher's 2x2, 4x2, 2x4: 2x2 each."""
    student, teacher = qwens
    batch = tiny_models.qwen2_vl_batch(student, ["tIIt", "It", "V"])
    monkeypatch.setattr(tiny_models, "GRIDS", [(1, 4, 4), (1, 8, 4), (1, 4, 8)])
    taught = tiny_models.qwen2_vl_batch(teacher, ["tIIt", "It", "V"])
    with VisualTokenPair(student, teacher, pool=True) as pair, VisualTokenTap(student) as tap:
        tokens = run(pair, student, teacher, batch, taught)
        unpooled, _ = tap.tokens(batch)
    assert tokens.lengths == [4, 4, 4, 8]
    assert len(tokens.student) == len(tokens.teacher) == 20
    grids = [(1, 2, 2), (1, 2, 3), (1, 4, 2), (2, 2, 2)]
    expected, _ = pool_tokens(unpooled, grids, [(1, 2, 2)] * 3 + [(2, 2, 2)])
    assert torch.equal(tokens.student, expected)
    torch.testing.assert_close(tokens.student[10], unpooled[[14, 16]].mean(0))


def test_pooling_takes_square_grids_that_are_given(llavas):
    student, _ = llavas
    torch.manual_seed(1)
    teacher = tiny_models.tiny_llava(seed=1, width=48, image_size=24)
    batch, taught = tiny_models.llava_batch(student, ["tIt", "I"]), tiny_models.llava_batch(teacher, ["tIt", "I"])
    taught = tiny_models.token_ids(["tIt", "I"], {"I": iter([[120] * 36] * 2)})
    taught["pixel_values"] = torch.randn(2, 3, 24, 24)
    student.zero_grad()
    with VisualTokenPair(student, teacher, pool=True) as pair:
        tokens = run(pair, student, teacher, batch, taught, student_grids=[(3, 3)] * 2, teacher_grids=[(6, 6)] * 2)
    assert tokens.lengths == [9, 9]
    RelationalCKA()(*tokens).backward()
    assert student.get_decoder().layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_pooling_without_knowing_the_grids_is_refused(llavas):
    student, teacher = llavas
    batch, taught = llava_batches(student)
    cases = [
        ({}, "student_grids must be given to pool: .* got student_grids=None for 3 images"),
        ({"student_grids": [(3, 3)]}, "student_grids must have one grid for each image, got 1 for 3 images"),
        ({"student_grids": [(3, 3), (3, 2), (3, 3)]}, r"cells .* got \(1, 3, 2\) for 9 tokens \(image 1\)"),
        ({"student_grids": [(3, 3)] * 3}, "teacher_grids must be given"),
        ({"student_grids": [(9,)] * 3}, r"student_grids\[0\] must be \(rows, columns\) or"),
    ]
    with VisualTokenPair(student, teacher, pool=True) as pair:
        for grids, message in cases:
            with pytest.raises(ValueError, match=message):
                run(pair, student, teacher, batch, taught, **grids)
    with VisualTokenPair(student, teacher) as pair, pytest.raises(ValueError, match="must be None without pool=True"):
        run(pair, student, teacher, batch, taught, teacher_grids=[(3, 3)] * 3)


def test_batches_without_images_are_no_error(llavas):
    student, teacher = llavas
    batch, taught = llava_batches(student, ["ttt"])
    for pool in (False, True):
        with VisualTokenPair(student, teacher, pool=pool) as pair:
            tokens = run(pair, student, teacher, batch, taught)
        assert (tokens.student.shape, tokens.teacher.shape, tokens.lengths) == ((0, 32), (0, 48), [])
        assert RelationalCKA()(*tokens) == 0


def test_a_forward_that_is_missing_is_an_error(llavas):
    student, teacher = llavas
    batch, taught = llava_batches(student)
    with VisualTokenPair(student, teacher) as pair:
        student(**batch)
        with pytest.raises(RuntimeError, match="no forward of the model was seen"):
            pair.tokens(batch, taught)


def test_one_module_as_both_is_refused(llavas):
    with pytest.raises(
        ValueError, match="student and teacher must be two modules, got one LlavaForConditionalGeneration"
    ):
        VisualTokenPair(llavas[0], llavas[0])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_one_model_with_and_without_its_adapters_is_refused(llavas):
    """The teacher's forward would go through the very blocks of the student, and replace what they left."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(copy.deepcopy(llavas[0]), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="student and teacher must be two modules, got one PeftModel as both"):
        VisualTokenPair(adapted, adapted.get_base_model())


def test_pooled_gradients_are_those_of_the_averages():
    tokens = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)
    grids, targets = [(2, 3), (1, 2, 3)], [(1, 2), (1, 1, 3)]
    assert torch.autograd.gradcheck(lambda x: pool_tokens(x, grids, targets)[0], tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_single_precision(dtype):
    tokens = torch.randn(64, 4).to(dtype)
    pooled, _ = pool_tokens(tokens, [(8, 8)], [(1, 1)])
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled[0], tokens.double().mean(0).to(dtype), **GRADIENT[dtype])


def test_pool_tokens_refuses_what_does_not_fit():
    tokens = torch.zeros(6, 2)
    for grids, targets, message in [
        ([(2, 3)], [], "as many, got 1 grids and 0 targets"),
        ([(2, 2)], [(1, 1)], "as many cells as there are tokens, got 4 and 6"),
        ([(2, 3)], [(3, 1)], r"no finer than grids along any axis, got \(1, 3, 1\) for \(1, 2, 3\) \(image 0\)"),
        ([(2, 0)], [(1, 1)], r"grids\[0\] must be at least 1, got grids\[0\]=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            pool_tokens(tokens, grids, targets)
    for grids, targets, name in [([6], [(1, 1)], "grids"), (None, [(1, 1)], "grids"), ([(2, 3)], [1], "targets")]:
        with pytest.raises(TypeError, match=f"{name} must be a sequence of"):
            pool_tokens(tokens, grids, targets)


@pytest.mark.parametrize("name", ["internvl", "idefics3", "smolvlm"])
def test_tiles_of_one_picture_are_compared_together(name):
    """Two samples, the first of a picture in two tiles and one in one tile, the second of a picture in three."""
    family = FAMILIES[name]
    student, teacher, batch = family.build(), family.build(width=64, seed=1), family.batch(["tIItI", "III"])
    with VisualTokenPair(student, teacher) as pair, torch.no_grad():
        student(**batch)
        teacher(**batch)
        tokens = pair.tokens(batch, lengths=[8, 4, 12])
        assert tokens.lengths == [8, 4, 12]
        alone = [RelationalCKA()(a, b) for a, b in zip(*(t.split([8, 4, 12]) for t in tokens[:2]), strict=True)]
        torch.testing.assert_close(RelationalCKA()(*tokens), torch.stack(alone).mean())
        student(**batch)
        teacher(**batch)
        with pytest.raises(ValueError, match="2 lengths with sum 20 for 24 placeholders"):
            pair.tokens(batch, lengths=[8, 12])
        with pytest.raises(ValueError, match="no image may cross from one sample to the next"):
            pair.tokens(batch, lengths=[8, 16])
