"""Options of transformers' TrainingArguments that `gracekit train` would take and not follow: they are refused instead."""

from __future__ import annotations

from typing import Any

_RESUMES = "a run goes on by itself from the last checkpoint in output_dir"
_EVALUATES = "there is no evaluation in a training: see gracekit evaluate"
# name: the value that stands for "not asked for", why no other is honoured
_REFUSED: dict[str, tuple[Any, str]] = {
    "resume_from_checkpoint": (None, _RESUMES),
    "label_smoothing_factor": (0.0, "the losses are those of the labels as they are"),
    "eval_strategy": ("no", _EVALUATES),  # before do_eval, which it sets
    "do_eval": (False, _EVALUATES),
    "do_predict": (False, _EVALUATES),
    "eval_on_start": (False, _EVALUATES),
    "save_only_model": (False, "what is killed could not go on"),
    "remove_unused_columns": (False, "the columns of a batch are what the model takes"),
}


def check_honoured(arguments: Any) -> None:
    """Refuse options that would change nothing.

    Args:
        arguments: transformers' TrainingArguments.

    Raises:
        ValueError: one is given.
    """
    for name, (neutral, why) in _REFUSED.items():
        value = getattr(arguments, name, neutral)
        value = getattr(value, "value", value)  # of an enumeration
        if value != neutral:
            raise ValueError(f"{name} must be left at {neutral!r} ({why}), got {name}={value!r}")
    if (kept := getattr(arguments, "save_total_limit", None)) is not None and kept < 2:
        # The old checkpoint goes before the new one is whole.
        raise ValueError(f"save_total_limit must be at least 2, or what is killed could lose all, got {kept}")


def check_reports(names: Any) -> None:
    """Refuse destinations of the log whose package is not installed, before any work is done.

    Args:
        names: ``report_to`` of the arguments.

    Raises:
        ValueError: one is unknown, or not there.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"report_to must name what is installed, got report_to={names!r}: {error}") from error
