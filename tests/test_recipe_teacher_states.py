"""A teacher that answered beforehand teaches what a teacher beside the student does."""

import pytest
import torch
from safetensors.torch import load_file
from test_recipe_global_batch import assert_equal_gradients, collate, objective, one_step, pair, sample
from transformers import TrainingArguments

from gracekit.recipe import teacher_states
from gracekit.recipe.distillation import Teacher
from gracekit.recipe.teacher_states import TaughtCollator, TaughtDataset, TeacherStates, compute_states, is_complete
from gracekit.recipe.trainer import GraceTrainer

CPU, ABOUT = torch.device("cpu"), {"teacher": "t", "max_length": 16}
SAMPLES = [sample(i) for i in range(8)]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(teacher_states, "SHARD", 3)


def answer(folder, *, from_hidden=True, visual=True, about=ABOUT, advance=lambda count: None):
    student, teacher = pair()
    taught = Teacher(teacher, student, from_hidden=from_hidden, visual=visual)
    compute_states(taught, SAMPLES, collate, folder, about, device=CPU, advance=advance)
    return taught


@pytest.mark.parametrize("losses", ["grace", "gdkd"])
@pytest.mark.parametrize(
    ("saved", "from_hidden"),
    [(True, True), (False, False), (True, False)],
    ids=["hidden", "logits", "hidden-to-logits"],
)
def test_a_student_of_saved_answers_has_the_gradient_of_one_beside_its_teacher(tmp_path, saved, from_hidden, losses):
    """Also where its head is more than a product while the teacher's is not, and where it wants no visual tokens."""
    expected, _ = one_step(tmp_path / "online", losses=losses, batch_size=4, accumulate=2, from_hidden=from_hidden)
    answer(tmp_path / "states", from_hidden=saved)
    states = TeacherStates(tmp_path / "states", ABOUT, visual=losses == "grace")
    assert states.from_hidden == saved
    assert ("tokens" in states[0]) == (losses == "grace")
    student, _ = pair()
    trainer = GraceTrainer(
        losses=losses,
        objective=objective(),
        teacher_head=states.head(),
        from_hidden=from_hidden,
        model=student,
        train_dataset=TaughtDataset(SAMPLES, states),
        data_collator=TaughtCollator(collate),
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=8),
    )
    batches, _ = trainer.get_batch_samples(
        iter([trainer.data_collator([trainer.train_dataset[i] for i in range(8)])]), 1, CPU
    )
    trainer.compute_loss(student, batches[0]).backward()
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert_equal_gradients(found, expected)


def test_an_interrupted_computation_goes_on_with_the_missing_shards(tmp_path):
    class CutError(Exception):
        pass

    def cut(count):
        done.append(count)
        if sum(done) == 5:
            raise CutError

    done = []
    with pytest.raises(CutError):
        answer(tmp_path, advance=cut)
    with pytest.raises(ValueError, match="must be complete, got 2 missing files"):
        TeacherStates(tmp_path, ABOUT)
    first = tmp_path / "states-00000.safetensors"
    written = first.stat().st_mtime_ns
    done = []
    answer(tmp_path, advance=done.append)
    assert done == [3, 1, 1, 1, 1, 1]
    assert first.stat().st_mtime_ns == written
    assert not list(tmp_path.glob("*.part"))
    states = TeacherStates(tmp_path, ABOUT)
    assert [len(states[i]["hidden"]) for i in range(8)] == [1, 6, 2, 0, 5, 3, 1, 4]
    assert [states[i]["lengths"].tolist() for i in (0, 2)] == [[9], []]


def test_answers_to_something_else_are_refused_by_what_differs(tmp_path):
    answer(tmp_path)
    with pytest.raises(ValueError, match="max_length: 16 -> 32"):
        answer(tmp_path, about=ABOUT | {"max_length": 32})
    with pytest.raises(ValueError, match="teacher: 't' -> 'u'"):
        TeacherStates(tmp_path, ABOUT | {"teacher": "u"})
    with pytest.raises(ValueError, match="must be a folder of a teacher's answers"):
        TeacherStates(tmp_path / "nothing", ABOUT)
    with pytest.raises(ValueError, match="an answer for each sample, got 8 for 7"):
        TaughtDataset(SAMPLES[:7], TeacherStates(tmp_path, ABOUT))


def test_answers_without_visual_tokens_serve_no_loss_that_takes_them(tmp_path):
    answer(tmp_path, visual=False)
    with pytest.raises(ValueError, match="visual: False -> True"):
        TeacherStates(tmp_path, ABOUT)
    assert set(TeacherStates(tmp_path, ABOUT, visual=False)[1]) == {"hidden"}


def test_answers_are_complete_with_all_shards_and_the_head(tmp_path):
    assert not is_complete(tmp_path)
    answer(tmp_path)
    assert is_complete(tmp_path)
    for name in ("head.safetensors", "states-00001.safetensors"):
        (tmp_path / name).rename(tmp_path / "away")
        assert not is_complete(tmp_path)
        with pytest.raises(ValueError, match="must be complete, got 1 missing files"):
            TeacherStates(tmp_path, ABOUT)
        (tmp_path / "away").rename(tmp_path / name)


@pytest.mark.parametrize("text", ["[]", "{}", "{"])
def test_a_description_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "states.json").write_text(text)
    for call in (lambda: TeacherStates(tmp_path, ABOUT), lambda: answer(tmp_path)):
        with pytest.raises(ValueError, match=r"a folder of a teacher's answers, got another states.json"):
            call()


def test_the_head_is_saved_once_and_answers_are_a_fraction_of_logits(tmp_path):
    taught = answer(tmp_path)
    states = TeacherStates(tmp_path, ABOUT)
    assert torch.equal(states.head(), taught.head)
    shard = load_file(tmp_path / "states-00000.safetensors")
    assert shard["1.hidden"].shape == (6, 48)
    assert shard["1.tokens"].shape == (9, 48)
