"""What `gracekit train` can be told: four dataclasses, from a preset, a YAML file and flags, the later over the earlier."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from gracekit._checks import check_choice, check_int, check_real
from gracekit.quant import LSQConfig
from gracekit.recipe.config import LOSSES, GraceConfig, option
from gracekit.recipe.unhonoured import check_honoured, check_reports

PRESETS = ("paper", "released", "small")
# What may differ when a run is taken up again: where, how fast and how loud, not what is computed.
_FREE = (
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "disable_tqdm",
    "logging_steps",
    "report_to",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
)


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """Which models.

    Args:
        student: directory or hub name of the model to train.
        teacher: directory or hub name of the model to learn from; not needed for ``losses="ce"``.
        precision: of the student's decoder: "int4" and "int8" train learned scales, "bf16" none.
        group_size: input weights that share a scale.
        student_dtype: of the weights in training; with "float32" let ``--bf16`` choose what products are computed in.
        teacher_mode: "online" runs it beside the student; "offload" keeps its weights on the CPU and brings them block by
            block; "precomputed" lets it answer for the whole data set once, before the student trains, and leave.
        teacher_states: folder of those answers; empty: ``teacher_states`` in the run's folder.
    """

    student: str = option("", "directory or hub name of the model to train")
    teacher: str = option("", "directory or hub name of the model to learn from")
    precision: Literal["int4", "int8", "bf16"] = option("int4", "of the student's decoder; bf16 trains no scales")
    group_size: int = option(128, "input weights that share a scale")
    student_dtype: Literal["float32", "bfloat16"] = option("float32", "of the student's weights in training")
    teacher_mode: Literal["online", "offload", "precomputed"] = option("online", "how the teacher answers")
    teacher_states: str = option("", "folder of a precomputed teacher's answers; empty: in the run's folder")

    def __post_init__(self) -> None:
        if not self.student:
            raise ValueError("student must name a model, got student=''")
        check_choice("precision", self.precision, ("int4", "int8", "bf16"))
        check_int("group_size", self.group_size, low=1)
        check_choice("student_dtype", self.student_dtype, ("float32", "bfloat16"))
        check_choice("teacher_mode", self.teacher_mode, ("online", "offload", "precomputed"))

    def quantiser(self) -> LSQConfig | None:
        """Return the format of the learned weights, or None."""
        if self.precision == "bf16":
            return None
        return LSQConfig(bits=int(self.precision.removeprefix("int")), group_size=self.group_size)

    def dtype(self) -> torch.dtype:
        """Return the dtype of the student's weights."""
        found: torch.dtype = getattr(torch, self.student_dtype)
        return found


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data.

    Args:
        data: conversations in the LLaVA format (JSON, JSONL) or a data set that ``datasets`` saved.
        image_folder: where relative paths of images start; empty: the folder of ``data``.
        max_length: tokens of one sample, visual ones included, at most.
        on_bad_record: "stop" refuses bad records before any training; "skip" leaves them out. Both write all of them to
            ``bad_records.jsonl`` in the run's folder.
        streaming: read records one after another, without a look at all of them beforehand: JSONL or a saved data set, in its own
            order, again and again until ``max_steps``. Bad records are treated as they are met.
    """

    data: str = option("", "conversations: JSON, JSONL, or a folder that `datasets` saved")
    image_folder: str = option("", "where relative paths of images start; empty: the folder of --data")
    max_length: int = option(2048, "tokens of one sample, visual ones included, at most")
    on_bad_record: Literal["stop", "skip"] = option("stop", "what to do about bad records")
    streaming: bool = option(
        False, "read records in their order, without a look at all of them beforehand; needs --max_steps"
    )

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data must name conversations, got data=''")
        check_int("max_length", self.max_length, low=2)
        check_choice("on_bad_record", self.on_bad_record, ("stop", "skip"))


@dataclass(frozen=True, kw_only=True)
class MethodConfig(GraceConfig):
    """The method: what the built-in recipe has, and which parts of it.

    Args:
        losses: "ce" the answers alone, "kl" and a plain KL divergence to the teacher, "gdkd" and the gated distillation, "rcka" and
            the relational part alone, "grace" everything.
        relational_warmup: optimiser steps over which omega rises from 0.
    """

    losses: str = option("grace", f"one of: {' '.join(LOSSES)}")
    relational_warmup: int = option(0, "optimiser steps over which omega rises from 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("losses", self.losses, LOSSES)
        check_int("relational_warmup", self.relational_warmup, low=0)


@dataclass
class TrainArguments(TrainingArguments):  # type: ignore[misc]
    """transformers' TrainingArguments, with the columns of a batch left alone and TensorBoard on."""

    output_dir: str | None = option("runs/train", "folder of this run; resumed if it holds an unfinished one")
    remove_unused_columns: bool | None = option(False, "")
    report_to: str | None = option("tensorboard", "tensorboard, wandb, trackio, ... or none")
    save_total_limit: int | None = option(2, "checkpoints to keep")
    logging_steps: float = option(10, "optimiser steps between two log entries")

    def __post_init__(self) -> None:
        # What the optimiser or the loader would refuse when records and models have been read.
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon"):
            check_real(name, getattr(self, name), low=0.0)
        for name in ("adam_beta1", "adam_beta2"):
            if check_real(name, getattr(self, name), low=0.0, high=1.0) == 1.0:
                raise ValueError(f"{name} must be below 1, got {name}=1.0")
        check_real("num_train_epochs", self.num_train_epochs, low=0.0, open_low=True)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            check_int(name, getattr(self, name), low=1)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run of `gracekit train`."""

    pair: PairConfig
    data: DataConfig
    method: MethodConfig
    training: TrainArguments

    def __post_init__(self) -> None:
        if self.method.losses != "ce" and not self.pair.teacher:
            raise ValueError(f"teacher must name a model for losses={self.method.losses!r}, got teacher=''")
        if self.data.streaming:
            self._check_streaming()
        calibration = self.method.calibration()
        if calibration is not None and self.training.max_steps > 0:
            calibration.begin(self.training.max_steps)

    def _check_streaming(self) -> None:
        if self.training.max_steps <= 0:
            raise ValueError(
                f"max_steps must be given with streaming, which has no end, got max_steps={self.training.max_steps}"
            )
        if self.pair.teacher_mode == "precomputed":
            raise ValueError(
                "teacher_mode must be 'online' or 'offload' with streaming, because answers are kept by the index of a record, "
                "got 'precomputed'"
            )
        order = getattr(self.training.train_sampling_strategy, "value", self.training.train_sampling_strategy)
        if order not in ("random", "sequential"):  # the first is what stands there if nothing is asked for
            raise ValueError(
                f"train_sampling_strategy must be left out with streaming, which keeps the order of the data, got {order!r}"
            )

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return the settings as plain values, by the name of their part."""
        training = {k: v for k, v in json.loads(self.training.to_json_string()).items() if k not in ("output_dir",)}
        return {
            "pair": asdict(self.pair),
            "data": asdict(self.data),
            "method": asdict(self.method),
            "training": training,
        }

    def differences(self, other: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Return "name: theirs -> ours" for every setting that changes what is trained and differs."""
        found = []
        free = set(_FREE)
        if self.data.streaming:
            # Each worker has a part of a stream, and samples come in their turn. One that has stopped at a bad record has left none
            # out, so it may go on and skip them.
            free = free - {"dataloader_num_workers"} | {"on_bad_record"}
        for part, mine in self.as_dict().items():
            theirs = other.get(part, {})
            for name in sorted(set(mine) & set(theirs) - free):
                if mine[name] != theirs[name]:
                    found.append(f"{name}: {theirs[name]!r} -> {mine[name]!r}")
        return found


def preset(name: str) -> dict[str, Any]:
    """Return the settings of a named preset."""
    check_choice("preset", name, PRESETS)
    text = (files("gracekit.recipe") / "assets" / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Return the settings of a command line: ``[FILE.yaml] [--preset NAME] [--option value ...]``.

    Raises:
        ValueError: an unknown option, one out of range, or one that would not be followed.
        FileNotFoundError: there is no such file.
    """
    given = list(arguments)
    settings: dict[str, Any] = {}
    path = Path(given.pop(0)) if given and not given[0].startswith("-") else None
    if path is not None:
        settings = _read(path)
    before = ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--preset", nargs="?", const="", default=settings.pop("preset", "paper"))
    chosen, given = before.parse_known_args(given)
    parser = HfArgumentParser(
        (PairConfig, DataConfig, MethodConfig, TrainArguments),
        prog="gracekit train",
        usage="%(prog)s [FILE.yaml] [--preset {paper,released,small}] [--option value ...]",
        description="Distil a vision-language model into a student with INT4, INT8 or plain weights. Defaults are those of "
        f"--preset {chosen.preset}.",
        allow_abbrev=False,
    )
    flags = _flags(settings)
    defaults = preset(chosen.preset)
    if "num_train_epochs" in {flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in [*flags, *given]}:
        defaults.pop("max_steps", None)  # with them transformers would not count epochs
    # As text, which argparse takes for what a command line says.
    parser.set_defaults(**{name: str(value) for name, value in defaults.items()})
    options = {action.dest for action in parser._actions}
    for name, value in settings.items():
        if str(name).replace("-", "_") not in options:
            raise ValueError(f"every key must be an option of gracekit train, got {name!r} in {path}")
        if value is None:
            raise ValueError(f"{name} must have a value, or be left out, got null in {path}")
    pair, data, method, training, *unknown = parser.parse_args_into_dataclasses(
        args=[*flags, *given], look_for_args_file=False, return_remaining_strings=True
    )
    if any(unknown):
        raise ValueError(f"every option must be one of gracekit train, spelt out, got {' '.join(*unknown)}")
    check_honoured(training)
    check_reports(training.report_to)
    return TrainConfig(pair=pair, data=data, method=method, training=training)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the settings file must be YAML, got {str(path)!r}: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"the settings file must be a mapping of option to value, got {type(found).__name__} in {path}"
        )
    return found


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """Spell settings as a command line does."""
    flags: list[str] = []
    for name, value in settings.items():
        if name == "fsdp" and isinstance(value, bool):  # this one knows the bare flag alone
            flags += ["--fsdp"] * value
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *map(str, values)]
    return flags
