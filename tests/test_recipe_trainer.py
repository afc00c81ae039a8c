"""GraceTrainer: its losses are the objective's, its controller goes with the optimiser, and a resumed stage is the same stage."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from recipe_cases import TINY, easy_vqa_tokenizer
from safetensors.torch import load_file
from transformers import TrainingArguments

from gracekit.quant import LSQConfig, prepare_qat
from gracekit.recipe.calibration import TauCalibration
from gracekit.recipe.callbacks import CONTROLLER_FILE, latest_checkpoint
from gracekit.recipe.config import GraceConfig
from gracekit.recipe.data import PackedVqa, load_easy_vqa
from gracekit.recipe.meters import Meters
from gracekit.recipe.models import build_model, teacher_outputs
from gracekit.recipe.stages import Stage, run_stage
from gracekit.recipe.step_losses import kl_divergence
from gracekit.recipe.trainer import GraceTrainer
from gracekit.vlm import VisualTokenTap

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return easy_vqa_tokenizer()


@pytest.fixture(scope="module")
def data(tokenizer):
    split = load_easy_vqa("train", 10)
    outputs = teacher_outputs(build_model(TINY, tokenizer, seed=9).eval(), split, tokenizer)
    return PackedVqa(split, tokenizer, image_tokens=TINY.image_tokens, questions_per_image=4, teacher=outputs)


def student(tokenizer, *, qat=False):
    model = build_model(TINY, tokenizer, seed=1)
    if qat:
        prepare_qat(model, LSQConfig(group_size=32))
    return model


def stage(name="one", losses="grace", steps=8):
    return Stage(
        name=name, losses=losses, steps=steps, learning_rate=1e-3, schedule="linear", batch_size=4, warmup=0.1,
        weight_decay=1e-3, seed=5,
    )  # fmt: skip


def trainer(tokenizer, data, folder, *, losses="grace", grace=None, **arguments):
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-3, **arguments}
    return GraceTrainer(
        losses=losses,
        objective=(grace or GraceConfig()).objective(losses),
        model=student(tokenizer, qat=True),
        train_dataset=data,
        data_collator=data.collate,
        args=TrainingArguments(output_dir=str(folder), **options),
    )


def test_the_loss_is_the_objective_of_logits_and_visual_tokens(tokenizer, data, tmp_path):
    one = trainer(tokenizer, data, tmp_path)
    batch = data.collate([0, 3, 4])
    found = one.compute_loss(one.model, batch)
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "pixel_values")}
    with VisualTokenTap(one.model, layer=-2) as tap:
        logits = one.model(**plain).logits[:, :-1]
        tokens, lengths = tap.tokens(plain)
    keep = batch["labels"][:, 1:] != -100
    given = {"student_tokens": tokens, "teacher_tokens": batch["teacher_tokens"], "lengths": lengths}
    expected = one.objective(logits[keep], batch["teacher_logits"], batch["labels"][:, 1:][keep], **given)
    torch.testing.assert_close(found, expected.total)
    assert expected.relational > 0
    assert expected.gated_dkd > 0


def test_cross_entropy_and_kl_are_means_over_the_supervised_tokens(tokenizer, data, tmp_path):
    batch = data.collate([1, 2])
    keep = batch["labels"][:, 1:] != -100
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "pixel_values")}
    for losses in ("ce", "kl"):
        one = trainer(tokenizer, data, tmp_path, losses=losses)
        logits = one.model(**plain).logits[:, :-1][keep]
        expected = F.cross_entropy(logits, batch["labels"][:, 1:][keep])
        if losses == "kl":
            expected = expected + kl_divergence(logits, batch["teacher_logits"], 2.0, len(logits))
        torch.testing.assert_close(one.compute_loss(one.model, batch), expected)


def test_learned_scales_have_ten_times_the_rate_and_no_decay(tokenizer, data, tmp_path):
    groups = trainer(tokenizer, data, tmp_path, weight_decay=0.1).create_optimizer().param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (1e-3, 0.0), (1e-2, 0.0)]


def test_the_optimiser_is_the_one_that_the_arguments_name(tokenizer, data, tmp_path):
    plain = trainer(tokenizer, data, tmp_path, adam_beta2=0.9).create_optimizer()
    assert isinstance(plain, torch.optim.AdamW)
    assert {group["betas"] for group in plain.param_groups} == {(0.9, 0.9)}
    other = trainer(tokenizer, data, tmp_path, optim="sgd").create_optimizer()
    assert isinstance(other, torch.optim.SGD)
    assert [group["lr"] for group in other.param_groups] == [1e-3, 1e-3, 1e-2]


def test_beta_moves_once_a_step_and_its_log_says_where_to(tokenizer, data, tmp_path):
    objective = GraceConfig(tau=0.0, eta=1e-6, ema_decay=0.0, beta_initial=0.5).objective("gdkd")
    log = run_stage(stage(losses="gdkd"), student(tokenizer), data, objective, tmp_path, device=CPU)
    assert [entry["step"] for entry in log] == [2, 4, 6, 8]
    # Two steps an entry, each of eta * L_GDKD; the entry holds the mean L_GDKD of the two.
    betas = [0.5] + [entry["beta"] for entry in log]
    moved = [after - before for before, after in itertools.pairwise(betas)]
    assert moved == pytest.approx([2e-6 * entry["gdkd"] for entry in log], rel=0.2)
    assert all(entry["saturated_share"] == 0 for entry in log)


def test_a_saturated_beta_warns_once(tokenizer, data, tmp_path):
    objective = GraceConfig(tau=0.0, eta=1.0, beta_max=1.0).objective("gdkd")
    with pytest.warns(UserWarning, match="beta has been on a bound") as caught:
        log = run_stage(stage(losses="gdkd", steps=60), student(tokenizer), data, objective, tmp_path, device=CPU)
    assert len([w for w in caught if "on a bound" in str(w.message)]) == 1
    assert log[-1]["beta"] == 1.0
    assert log[-1]["saturated_share"] > 0.9


def test_what_the_controller_does_not_know_yet_is_not_logged(tokenizer, data, tmp_path):
    objective = GraceConfig(tau="auto").objective("gdkd")
    found = dataclasses.replace(stage(losses="gdkd"), tau=TauCalibration(3))
    log = run_stage(found, student(tokenizer), data, objective, tmp_path, device=CPU)
    assert [("tau" in entry, "ema" in entry) for entry in log] == [
        (False, False),
        (True, True),
        (True, True),
        (True, True),
    ]
    assert {entry["tau"] for entry in log[1:]} == {objective.controller.target}


@pytest.mark.parametrize("tau", ["1.0", "auto"])
def test_steps_that_are_not_finite_are_counted_in_the_log_and_warned_of_once(
    tokenizer, data, tmp_path, monkeypatch, tau
):
    def broken(self):
        value, self.calls = end_step(self), getattr(self, "calls", 0) + 1
        return value * torch.nan if self.calls in (2, 7) else value

    end_step = Meters.end_step
    monkeypatch.setattr(Meters, "end_step", broken)
    grace = GraceConfig(tau=tau)
    found = dataclasses.replace(stage(losses="gdkd"), tau=grace.calibration())
    with pytest.warns(UserWarning, match="L_GDKD was not finite in 1 steps up to step 2") as caught:
        log = run_stage(found, student(tokenizer), data, grace.objective("gdkd"), tmp_path, device=CPU)
    assert len([w for w in caught if "not finite" in str(w.message)]) == 1
    assert [entry["skipped"] for entry in log] == [1, 1, 1, 2]
    assert all(math.isfinite(entry[name]) for entry in log[1:] for name in ("beta", "ema") if name in entry)
    assert math.isfinite(log[-1]["tau"])


class CutError(Exception):
    pass


@pytest.mark.parametrize(("losses", "qat", "stop"), [("grace", True, 5), ("ce", False, 7)])
def test_a_resumed_stage_ends_bit_for_bit_where_an_uninterrupted_one_does(tokenizer, data, tmp_path, losses, qat, stop):
    def run(folder, report=lambda step, text: None):
        model, objective = student(tokenizer, qat=qat), GraceConfig().objective(losses)
        log = run_stage(stage(losses=losses), model, data, objective, folder, device=CPU, report=report)
        return {**model.state_dict(), **objective.controller.state_dict()}, log

    def interrupt(step, text):
        if step == stop:
            raise CutError

    expected, log = run(tmp_path / "whole")
    with pytest.raises(CutError):
        run(tmp_path / "cut", interrupt)
    steps = []
    found, found_log = run(tmp_path / "cut", lambda step, text: steps.append(step))
    assert steps[0] == 2 * ((stop - 1) // 2) + 1  # a checkpoint every 2 steps
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    assert [(e["step"], e["ce"]) for e in found_log] == [(e["step"], e["ce"]) for e in log]


def test_a_stage_that_was_cut_after_its_last_checkpoint_is_not_trained_further(tokenizer, data, tmp_path, monkeypatch):
    def run(folder, report=lambda step, text: None):
        model, objective = student(tokenizer, qat=True), GraceConfig().objective("grace")
        log = run_stage(stage(steps=6), model, data, objective, folder, device=CPU, report=report)
        return {**model.state_dict(), **objective.controller.state_dict()}, log

    def cut(*_):
        raise CutError

    expected, log = run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(CutError):
        patch.setattr("gracekit.recipe.stages.save_state", cut)
        run(tmp_path / "cut")
    assert latest_checkpoint(tmp_path / "cut" / "one").name == "checkpoint-6"
    found, found_log = run(tmp_path / "cut", lambda step, text: pytest.fail("trained again"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    assert [(e["step"], e["ce"]) for e in found_log] == [(e["step"], e["ce"]) for e in log]


def test_a_checkpoint_of_another_folder_brings_its_own_controller(tokenizer, data, tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4}
    whole = trainer(tokenizer, data, tmp_path / "a", **options)
    whole.train()
    other = trainer(tokenizer, data, tmp_path / "b", **options)
    other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, value in whole.objective.controller.state_dict().items():
        assert torch.equal(other.objective.controller.state_dict()[name], value), name
    for (name, value), found in zip(whole.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(found, value), name


def test_a_checkpoint_that_was_cut_short_does_not_count(tokenizer, data, tmp_path):
    for step, whole in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / CONTROLLER_FILE).touch()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / CONTROLLER_FILE).touch()
    assert latest_checkpoint(tmp_path).name == "checkpoint-10"
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_a_finished_stage_is_loaded_and_not_trained(tokenizer, data, tmp_path):
    objective = GraceConfig().objective("grace")
    model = student(tokenizer)
    run_stage(stage(steps=2), model, data, objective, tmp_path, device=CPU)
    again, other = student(tokenizer), GraceConfig().objective("grace")
    before = copy.deepcopy(again.state_dict())
    run_stage(stage(steps=2), again, data, other, tmp_path, device=CPU, report=lambda *_: pytest.fail("trained again"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in again.state_dict().items())
    assert torch.equal(other.controller.multiplier, objective.controller.multiplier)
    assert not list((tmp_path / "one").glob("checkpoint-*"))
    assert set(load_file(tmp_path / "one" / CONTROLLER_FILE)) == {"multiplier", "ema", "skipped", "saturated_steps"}
