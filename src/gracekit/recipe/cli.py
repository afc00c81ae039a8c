"""The command line: ``gracekit NAME ...``; ``python -m gracekit.recipe`` is ``gracekit recipe``."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Sequence

# Set before anything of these packages is imported.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
if "LOCAL_RANK" not in os.environ:
    # One process has one GPU: transformers' Trainer would spread the model over all it sees, DataParallel fashion.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def recipe(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; 0 when its report stands."""
    from gracekit.recipe.config import parse
    from gracekit.recipe.experiment import run_recipe, teacher_variant
    from gracekit.recipe.progress import quiet, say
    from gracekit.recipe.report import print_table, read_results, write_report
    from gracekit.recipe.runs import announce, attempt, open_folder
    from gracekit.recipe.stages import write_json

    quiet()
    config = parse(arguments, "gracekit recipe")
    try:
        teacher_variant(config.run.teacher)
        folder = open_folder(config)
    except (ValueError, OSError) as error:
        print(f"gracekit recipe: error: {error}", file=sys.stderr)
        return 2
    if folder is None:
        say(f"This run is finished; nothing was done. Its report: {config.run.output}/report.html")
        print_table(read_results(config.run.output))
        return 0
    announce(folder)
    home = folder

    def work() -> None:
        results = run_recipe(config, home)
        write_report(home, results)
        # Last, because this file is what makes the run a finished one.
        write_json(home / "results.json", results)
        print_table(results)
        say(f"Report: {home / 'report.html'}")

    return attempt("recipe", work)


def teacher(arguments: Sequence[str] | None = None) -> int:
    """Train a teacher for the recipe."""
    from transformers import HfArgumentParser

    from gracekit.recipe.progress import quiet
    from gracekit.recipe.runs import attempt
    from gracekit.recipe.teacher import TeacherConfig, train_teacher

    quiet()
    parser = HfArgumentParser(TeacherConfig, prog="gracekit teacher", description=teacher.__doc__)
    try:
        (config,) = parser.parse_args_into_dataclasses(args=arguments)
    except (ValueError, TypeError) as error:
        print(f"gracekit teacher: error: {error}", file=sys.stderr)
        return 2
    return attempt("teacher", lambda: train_teacher(config))


def train(arguments: Sequence[str] | None = None) -> int:
    """Distil a vision-language model into a student with INT4, INT8 or plain weights."""
    from gracekit.recipe.train import main as train_main

    return train_main(arguments)


def inspect(arguments: Sequence[str] | None = None) -> int:
    """Say what a saved model has, what would be quantised, its size, and what would not work."""
    from gracekit.recipe.inspect_model import main as inspect_main

    return inspect_main(arguments)


def quantize(arguments: Sequence[str] | None = None) -> int:
    """Round a saved model's decoder to nearest and write it for an engine."""
    from gracekit.recipe.quantize import quantize as quantize_main

    return quantize_main(arguments)


def export(arguments: Sequence[str] | None = None) -> int:
    """Write a model trained with learned scales for an engine."""
    from gracekit.recipe.quantize import export as export_main

    return export_main(arguments)


def ablate(arguments: Sequence[str] | None = None) -> int:
    """Run the paper's ablations at the recipe's scale, over several seeds."""
    from gracekit.recipe.ablate import main as ablate_main

    return ablate_main(arguments)


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """Ask a saved model the questions of a held-out set, and say how many answers are right."""
    from gracekit.recipe.evaluate_model import main as evaluate_main

    return evaluate_main(arguments)


def generate(arguments: Sequence[str] | None = None) -> int:
    """Answer a prompt about pictures with a saved model, and say how fast."""
    from gracekit.recipe.generate import main as generate_main

    return generate_main(arguments)


COMMANDS: dict[str, Callable[[Sequence[str] | None], int]] = {
    "recipe": recipe,
    "teacher": teacher,
    "train": train,
    "inspect": inspect,
    "quantize": quantize,
    "export": export,
    "ablate": ablate,
    "evaluate": evaluate,
    "generate": generate,
}
HUB = ("train",)  # commands that take names of a hub


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand that the first argument names."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        if given[0] not in HUB:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # they work on folders, and must not wait for a network
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # an answer may have what the terminal's encoding has not
        try:
            return COMMANDS[given[0]](given[1:])
        except KeyboardInterrupt:  # of commands that have nothing more to say of it
            print(f"gracekit {given[0]}: interrupted", file=sys.stderr)
            return 130
    helped = bool(given) and given[0] in ("-h", "--help")
    lines = [f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items()]
    text = "\n".join(["usage: gracekit COMMAND ... (gracekit COMMAND --help for its options)", "", *lines])
    print(text, file=sys.stdout if helped else sys.stderr)
    return 0 if helped else 2


if __name__ == "__main__":
    raise SystemExit(main())
