"""What a target tau does to the controller on the built-in data: the paper's, the authors' released run's, and `--tau auto`.

A controller that works moves beta between its bounds; one whose target is out of reach, or never missed, is a constant.
"""

import tempfile
from pathlib import Path

import _harness

from gracekit.recipe.cli import main as gracekit
from gracekit.recipe.report import read_results

SETTINGS = {
    "paper": ["--tau", "0.35", "--beta_initial", "1.0", "--ema_decay", "0.99", "--omega", "1.0"],
    "released": ["--tau", "3.0", "--eta", "0.003", "--beta_max", "1.0", "--ema_decay", "0.99"],
    "recipe": [],
    "auto": ["--tau", "auto"],
}
KEPT = ("step", "gdkd", "beta", "ema", "tau", "saturated_share")


def run(arguments: list[str], folder: Path) -> dict:
    assert gracekit(["recipe", "--losses", "grace", "--output", str(folder), *arguments]) == 0
    variants = {variant["name"]: variant for variant in read_results(folder)["variants"]}
    history = variants["grace-bf16"]["history"]
    return {
        "accuracy_bf16": variants["grace-bf16"]["accuracy"],
        "accuracy_int4": variants["grace-int4-qat"]["accuracy"],
        "questions": variants["grace-bf16"]["questions"],
        "share_of_steps_on_a_bound": sum(entry["saturated_share"] for entry in history) / len(history),
        "least_beta": min(entry["beta"] for entry in history),
        "greatest_beta": max(entry["beta"] for entry in history),
        "history": [{name: entry[name] for name in KEPT if name in entry} for entry in history],
    }


def main() -> None:
    parser = _harness.parser(__doc__)
    parser.add_argument("--only", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    given, rest = parser.parse_known_args()  # the rest goes to `gracekit recipe`
    rest += ["--device", given.device]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            row = {"variant": name, "arguments": SETTINGS[name], **run([*SETTINGS[name], *rest], Path(folder) / name)}
            _harness.show({key: value for key, value in row.items() if key != "history"})
            rows.append(row)
    _harness.write("controller", given.device, {"more_arguments": rest, "rows": rows}, given.output)


if __name__ == "__main__":
    main()
