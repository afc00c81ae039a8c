"""What a run of the recipe can be told, checked before any work: three frozen dataclasses, one command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from gracekit._checks import check_choice, check_int, check_real
from gracekit.control import LagrangianController
from gracekit.losses import ConfidenceGatedDKD, RelationalCKA
from gracekit.objective import GraceObjective
from gracekit.recipe.calibration import TauCalibration

LOSSES = ("ce", "kl", "gdkd", "rcka", "grace")


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with a default and a line of help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes, what it compares and on what.

    Args:
        output: folder of this run; made if absent, resumed if it holds an unfinished run with the same settings.
        seed: of the initial weights and of the order of the data.
        device: "auto" takes CUDA where there is one.
        losses: what the students are trained with, each in BF16 and INT4: "ce" the answers alone, "kl" and a plain KL divergence
            to the teacher, "gdkd" and the gated distillation, "grace" all three parts.
        train_images: how many of easy-VQA's 4,000 training images to use.
        test_images: how many of its 1,000 test images to answer questions about.
        teacher: folder of a teacher; empty for the one in the package, or with ``data`` for one that the run trains first.
        data: folder of one's own data: train.json and test.json (or .jsonl) in the LLaVA format; empty for easy-VQA.
        image_folder: where relative paths of images start; empty: ``data``.
        image_size: side of the square that images of ``data`` are brought to, in pixels, a multiple of 8.
        teacher_steps: optimiser steps of the teacher that is trained on ``data``.
        on_bad_record: of ``data``: "stop" refuses bad records before any training; "skip" leaves them out. Both write all of them
            to ``bad_records-train.jsonl`` and ``bad_records-test.jsonl`` in the run's folder.
    """

    output: str = option("runs/recipe", "folder of this run; resumed if it holds an unfinished one")
    seed: int = option(0, "seed of the initial weights and of the order of the data")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to train and answer")
    losses: list[str] = field(
        default_factory=lambda: ["ce", "grace"],
        metadata={"help": f"what to train students with, of: {' '.join(LOSSES)}"},
    )
    train_images: int = option(4000, "training images to use, at most 4000")
    test_images: int = option(1000, "test images to answer questions about, at most 1000")
    teacher: str = option("", "folder of a teacher; empty: the one in the package, or with --data one trained first")
    data: str = option("", "folder of your own data, with train.json and test.json; empty: easy-VQA")
    image_folder: str = option("", "where relative paths of images of --data start; empty: that folder")
    image_size: int = option(64, "side of the square that images of --data are brought to, in pixels, a multiple of 8")
    teacher_steps: int = option(3500, "optimiser steps of the teacher that is trained on --data")
    on_bad_record: Literal["stop", "skip"] = option("stop", "what to do about bad records of --data")

    def __post_init__(self) -> None:
        check_int("seed", self.seed, low=0)
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        if not self.losses or len(set(self.losses)) < len(self.losses):
            raise ValueError(f"losses must name one or more, each once, got losses={self.losses!r}")
        for name in self.losses:
            check_choice("losses", name, LOSSES)
        check_int("train_images", self.train_images, low=8, high=4000)
        check_int("test_images", self.test_images, low=1, high=1000)
        check_int("image_size", self.image_size, low=16, high=512)
        if self.image_size % 8:
            raise ValueError(f"image_size must be a multiple of 8, got image_size={self.image_size}")
        check_int("teacher_steps", self.teacher_steps, low=2)
        check_choice("on_bad_record", self.on_bad_record, ("stop", "skip"))
        of_own_data = ("image_folder", "image_size", "teacher_steps", "on_bad_record")
        of_the_other = ("train_images", "test_images") if self.data else of_own_data
        for name in of_the_other:
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default:
                rule = "with data, all of which is used" if self.data else "without data"
                raise ValueError(f"{name} must not be given {rule}, got {name}={getattr(self, name)!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be one that is present, got device='cuda' and no CUDA device")

    def torch_device(self) -> torch.device:
        """Return the device that ``device`` stands for."""
        wanted = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        return torch.device(wanted)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast every student trains; all losses alike.

    A student starts with ``steps`` steps at a constant rate; from there ``finish_steps`` steps with a falling rate are made
    twice, once in full precision (the BF16 student and its RTN) and once with INT4 weights in the loop. So all variants have
    seen the same data equally often.

    Args:
        steps: optimiser steps of the common start.
        finish_steps: further steps, in full precision and again as QAT; 0 means a quarter of ``steps``.
        batch_size: packed examples a step: one image and up to ``questions_per_image`` of its questions each.
        questions_per_image: questions packed behind one image.
        learning_rate: of AdamW.
        finish_learning_rate: the same at the beginning of the finish, for both precisions.
        weight_decay: of parameters with two or more dimensions.
        warmup: share of a stage's steps in which its rate rises.
        group_size: input weights that share a scale.
    """

    steps: int = option(1000, "optimiser steps of the start that BF16 and INT4 students share")
    finish_steps: int = option(0, "further steps, in BF16 and again with INT4 weights; 0: a quarter of --steps")
    batch_size: int = option(32, "images a step")
    questions_per_image: int = option(4, "questions packed behind one image")
    learning_rate: float = option(2e-3, "of the common start")
    finish_learning_rate: float = option(2e-3, "at the beginning of the finish, from where it falls to 0")
    weight_decay: float = option(1e-3, "of parameters with two or more dimensions")
    warmup: float = option(0.05, "share of a stage's steps in which the rate rises")
    group_size: int = option(64, "weights that share a scale: 32 or 64")

    def __post_init__(self) -> None:
        check_int("steps", self.steps, low=2)
        check_int("finish_steps", self.finish_steps, low=0)
        check_int("batch_size", self.batch_size, low=1)
        check_int("questions_per_image", self.questions_per_image, low=1)
        check_real("learning_rate", self.learning_rate, low=0.0, open_low=True)
        check_real("finish_learning_rate", self.finish_learning_rate, low=0.0, open_low=True)
        check_real("weight_decay", self.weight_decay, low=0.0)
        check_real("warmup", self.warmup, low=0.0, high=1.0)
        check_choice("group_size", self.group_size, (32, 64))

    @property
    def finish(self) -> int:
        """Steps of the finish."""
        return self.finish_steps or max(1, self.steps // 4)


@dataclass(frozen=True, kw_only=True)
class GraceConfig:
    """The method's own numbers: L_CE + beta * L_GDKD + omega * L_RCKA.

    Chosen so that the controller works between its bounds on this data: L_GDKD falls from about 20 to below 1 within a
    thousand steps, and the paper's tau of 0.35 with beta up to 5, or the authors' released tau of 3 with beta up to 1, leave beta
    on a bound for most of them. A faster moving average (0.95 instead of 0.99) keeps the first steps from driving it to the
    ceiling.

    Args:
        temperature: of the distillation.
        alpha: weight of the target-class part.
        beta_dkd: weight of the other classes' part.
        tau: what the controller brings L_GDKD down to; a number, or "auto": the ``tau_quantile`` of what L_GDKD is in the first
            ``tau_steps`` steps, in which beta stays at ``beta_initial``.
        tau_steps: steps that "auto" looks at; 0: the first 70 % of the training.
        tau_quantile: in [0, 1], of their L_GDKD.
        eta: its step size; 0 keeps beta at ``beta_initial``.
        beta_initial: multiplier of L_GDKD at the start.
        beta_min: its floor.
        beta_max: its ceiling.
        ema_decay: smoothing of L_GDKD in the controller.
        omega: weight of L_RCKA.
    """

    temperature: float = option(2.0, "of the distillation")
    alpha: float = option(1.0, "weight of the target class's part")
    beta_dkd: float = option(4.0, "weight of the other classes' part")
    tau: str = option("1.0", "what the controller brings L_GDKD down to: a number, or auto")
    tau_steps: int = option(0, "optimiser steps that --tau auto looks at; 0: the first seven tenths of the training")
    tau_quantile: float = option(0.1, "quantile of their L_GDKD that --tau auto takes")
    eta: float = option(0.0015, "step size of the controller; 0 keeps beta fixed")
    beta_initial: float = option(0.5, "multiplier of L_GDKD at the start")
    beta_min: float = option(0.1, "its floor")
    beta_max: float = option(5.0, "its ceiling")
    ema_decay: float = option(0.95, "smoothing of L_GDKD in the controller")
    omega: float = option(3.0, "weight of L_RCKA")

    def __post_init__(self) -> None:
        if self.tau != "auto":
            try:
                check_real("tau", float(self.tau))
            except ValueError:
                raise ValueError(f"tau must be a number or 'auto', got tau={self.tau!r}") from None
        TauCalibration(self.tau_steps, self.tau_quantile)
        check_real("eta", self.eta, low=0.0)
        check_real("beta_min", self.beta_min, low=0.0)
        check_real("beta_max", self.beta_max, low=self.beta_min)
        check_real("beta_initial", self.beta_initial, low=self.beta_min, high=self.beta_max)
        check_real("omega", self.omega, low=0.0)
        self.objective("grace")  # temperature, alpha, beta_dkd and ema_decay have the same names there

    def objective(self, losses: str, *, vocab_size: int | None = None) -> GraceObjective:
        """Return the objective of some losses, with no relational part unless "rcka" or "grace".

        Args:
            losses: one of LOSSES.
            vocab_size: classes to compare, where student and teacher pad one vocabulary differently.
        """
        return GraceObjective(
            ConfidenceGatedDKD(self.temperature, self.alpha, self.beta_dkd, vocab_size=vocab_size),
            RelationalCKA(),
            LagrangianController(
                0.0 if self.tau == "auto" else float(self.tau),
                lr=self.eta,
                initial=self.beta_initial,
                bounds=(self.beta_min, self.beta_max),
                ema_decay=self.ema_decay,
            ),
            relational_weight=self.omega if losses in ("rcka", "grace") else 0.0,
        )

    def calibration(self) -> TauCalibration | None:
        """Return what finds tau, where that is "auto"."""
        return TauCalibration(self.tau_steps, self.tau_quantile) if self.tau == "auto" else None


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    grace: GraceConfig = field(default_factory=GraceConfig)

    def __post_init__(self) -> None:
        calibration = self.grace.calibration()
        if calibration is not None:
            calibration.begin(self.train.steps)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, by the name of their part."""
        return asdict(self)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Return "part.name: theirs -> ours" for every setting that changes results and differs; ``output`` does not."""
        mine = _flatten(self.as_dict())
        # A run that was made before a setting existed has its default.
        theirs = _flatten(RecipeConfig().as_dict()) | _flatten(other)
        names = sorted((mine.keys() | theirs.keys()) - {"run.output"})
        return [f"{n}: {theirs.get(n)!r} -> {mine.get(n)!r}" for n in names if mine.get(n) != theirs.get(n)]


def parse(arguments: Sequence[str] | None, prog: str) -> RecipeConfig:
    """Return the settings of a command line; a bad one ends the program with a line that says why."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        (RunConfig, TrainConfig, GraceConfig),
        prog=prog,
        description="GRACE end to end on easy-VQA or your own folder: distil, train with INT4 weights, answer with the INT4 "
        "kernel, report.",
    )
    try:
        run, train, grace = parser.parse_args_into_dataclasses(args=arguments)
        config = RecipeConfig(run=run, train=train, grace=grace)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    return config


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    return {f"{part}.{name}": value for part, values in settings.items() for name, value in values.items()}
