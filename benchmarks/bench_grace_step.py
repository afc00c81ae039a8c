"""What a GRACE step costs beyond what any distillation has: student forward and backward, teacher forward, cross-entropy.

The baseline is transformers' own: the student's loss from full logits, its backward, and the teacher's forward without gradients.
The other rows add the method's parts one after the other, up to a whole GRACE step with INT4 weights in the loop. Random
weights, real shapes, no optimiser (it is the same for all).

python benchmarks/bench_grace_step.py                  # on CUDA: Qwen2-VL-2B learns from Qwen2-VL-7B in bfloat16
python benchmarks/bench_grace_step.py --device cpu     # tiny models in float32
"""

from __future__ import annotations

import _harness
import torch
from _models import built, qwen2_vl_2b, qwen2_vl_7b
from bench_visual_tap import tiny_models

from gracekit import ConfidenceGatedDKD, GraceObjective, shift_labels
from gracekit.quant import LSQConfig, prepare_qat
from gracekit.recipe.distillation import Reader, Teacher, head_weight, supervised_rows
from gracekit.recipe.step_losses import Share, counts_of, global_counts, losses_of

SAMPLES, IMAGE, TEXT, ANSWER = 4, (1, 48, 50), 424, 150
AGAIN = "baseline, again"
VARIANTS = ("baseline", "ce from hidden states", "+ gdkd", "+ rcka", AGAIN, "+ int4 weights: GRACE")
BASELINES = ("baseline", AGAIN)
LOSSES = {"ce from hidden states": "ce", "+ gdkd": "gdkd"}


def real_batch(config):
    """Four samples of about 1,000 tokens: an image of 600 tokens, a question, and an answer that is supervised."""
    tokens = IMAGE[1] * IMAGE[2] // 4
    text = torch.randint(5, 1000, (SAMPLES, TEXT))
    ids = torch.cat([torch.full((SAMPLES, tokens), config.image_token_id), text], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.randn(SAMPLES * IMAGE[1] * IMAGE[2], 1176),
        "image_grid_thw": torch.tensor([IMAGE] * SAMPLES),
    }


def tiny(width, vocab_size, seed):
    sections = [width // 32, 3 * width // 64, 3 * width // 64]  # of half a head
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e4}
    return tiny_models.tiny_qwen2_vl(width=width, layers=4, vocab_size=vocab_size, seed=seed, rope_parameters=rope)


MODELS = {
    "cuda": (qwen2_vl_2b, qwen2_vl_7b, lambda model: real_batch(model.config), 151936),
    "cpu": (
        lambda: tiny(256, 4096, 0),
        lambda: tiny(384, 4160, 1),
        lambda model: tiny_models.qwen2_vl_batch(model, ["I" + 200 * "t"] * SAMPLES),
        4096,
    ),
}


def labelled(batch):
    labels = batch["input_ids"].clone()
    labels[:, : -min(ANSWER, labels.shape[1] // 2)] = -100
    return labels


class Step:
    """One forward and backward of a variant; gradients are let go of afterwards."""

    def __init__(self, variant, student, teacher, batch, vocab_size):
        self.variant, self.student, self.teacher, self.batch = variant, student, teacher, batch
        self.labels = labelled(batch)
        self.rows = supervised_rows(self.labels)
        self.targets = shift_labels(self.labels).flatten()[self.rows]
        self.losses = LOSSES.get(variant, "grace")
        visual = self.losses == "grace"
        self.teach = Teacher(teacher, student, from_hidden=True, visual=visual)
        self.reader = Reader(student, from_hidden=True, visual=visual)
        self.objective = GraceObjective(ConfidenceGatedDKD(vocab_size=vocab_size)).to(self.labels.device)

    def share(self):
        """The teacher's side and the sums of the step, as the trainer has them before the student's forward."""
        signal = self.teach(self.batch, self.rows)
        return Share(signal=signal, counts=global_counts([counts_of(signal, self.targets, self.objective)]))

    def __call__(self):
        if self.variant in BASELINES:
            with torch.no_grad():
                self.teacher(**self.batch, use_cache=False)
            self.student(**self.batch, labels=self.labels, use_cache=False).loss.backward()
        else:
            share = self.share()
            seen, _ = self.reader(self.student, self.batch, self.rows)
            head = head_weight(self.student)
            losses_of(self.losses, seen, head, self.targets, share, self.objective).total.backward()
        self.student.zero_grad(set_to_none=True)


def parts(step, device, runs):
    """Milliseconds of the step's parts, each timed alone."""
    teacher = _harness.measure(step.share, device, runs=runs)
    with torch.no_grad():
        forward = _harness.measure(lambda: step.reader(step.student, step.batch, step.rows), device, runs=runs)
    share, head = step.share(), head_weight(step.student)
    seen, _ = step.reader(step.student, step.batch, step.rows)
    leaves = seen._replace(
        hidden=seen.hidden.detach().requires_grad_(),
        tokens=None if seen.tokens is None else seen.tokens.detach().requires_grad_(),
    )

    def losses():
        losses_of(step.losses, leaves, head, step.targets, share, step.objective).total.backward()
        step.student.zero_grad(set_to_none=True)

    return {
        "teacher_and_sums_ms": teacher["median_ms"],
        "student_forward_ms": forward["median_ms"],
        "losses_and_their_gradients_ms": _harness.measure(losses, device, runs=runs)["median_ms"],
    }


def main() -> None:
    given = _harness.parser(__doc__).parse_args()
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    make_student, make_teacher, make_batch, vocab_size = MODELS[given.device]
    torch.manual_seed(0)
    student, teacher = (built(make, given.device, dtype).train() for make in (make_student, make_teacher))
    teacher.eval().requires_grad_(False)
    batch = {
        name: value.to(given.device, dtype if value.is_floating_point() else value.dtype)
        for name, value in make_batch(student).items()
    }
    rows, base = [], None
    for variant in VARIANTS:
        if variant == VARIANTS[-1]:
            prepare_qat(student, LSQConfig(group_size=128))
        step = Step(variant, student, teacher, batch, vocab_size)
        row = {"variant": variant, **_harness.measure(step, given.device, runs=given.runs)}
        base = row if base is None or variant == AGAIN else base  # the nearest in time
        row["times_baseline"] = round(row["median_ms"] / base["median_ms"], 4)
        row["peak_times_baseline"] = round(row["peak_mib"] / base["peak_mib"], 4)
        if variant not in BASELINES:
            row |= parts(step, given.device, given.runs)
        _harness.show(row)
        rows.append(row)
    about = {"dtype": str(dtype), "length": batch["input_ids"].shape[1], "samples": SAMPLES, "rows": rows}
    about["resident_mib"] = _resident(student, teacher)
    _harness.write("grace_step", given.device, about, given.output)


def _resident(*models):
    """Weights that are there before a step; the peaks above come on top."""
    return round(sum(p.numel() * p.element_size() for model in models for p in model.parameters()) / 2**20, 1)


if __name__ == "__main__":
    main()
