"""What a finished run shows: a table, plots, and a page with test images and their INT4 answers."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import torch
from PIL import Image
from rich.table import Table

from gracekit.recipe.config import RunConfig
from gracekit.recipe.data import VqaSplit
from gracekit.recipe.own_data import load_splits
from gracekit.recipe.progress import console
from gracekit.recipe.stages import write_text

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHOWN = 60
COLOURS = {"ce": "#8a8a8a", "kl": "#c98a2b", "gdkd": "#3b7ea1", "rcka": "#8e5ea2", "grace": "#2a7d4f"}
LOSS_NAMES = {
    "ce": "CE",
    "kl": "CE + KL",
    "gdkd": "CE + GDKD",
    "rcka": "CE + RCKA",
    "grace": "CE + GDKD + RCKA",
}


def read_results(folder: str | Path) -> dict[str, Any]:
    """Return the results.json of a run."""
    found: dict[str, Any] = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    return found


def rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """Return the table of a run as text, a row a variant in the order of results.json."""
    return [
        {
            "variant": variant["name"],
            "losses": LOSS_NAMES[variant["losses"]],
            "precision": variant["precision"],
            "kernel": variant["kernel"],
            "steps": "-" if variant["steps"] is None else str(variant["steps"]),
            "accuracy": f"{100 * variant['accuracy']:.2f}",
        }
        for variant in results["variants"]
    ]


def print_table(results: dict[str, Any]) -> None:
    """Print the accuracy of every variant."""
    table = Table(
        title=f"Answers to {results['questions']:,} questions about unseen images, seed {results['config']['run']['seed']}"
    )
    lines = rows(results)
    for name in lines[0]:
        numeric = name in ("steps", "accuracy")
        title = name + (" (%)" if name == "accuracy" else "")
        table.add_column(title, justify="right" if numeric else "left", overflow="fold", no_wrap=name == "variant")
    for line in lines:
        table.add_row(*line.values())
    console.print(table)


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Write losses.png, beta.png, accuracy.png and report.html into a run's folder."""
    plots = {"losses": _plot_losses, "beta": _plot_beta, "accuracy": _plot_accuracy}
    drawn = {}
    for name, draw in plots.items():
        figure = draw(results)
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
            plt.close(figure)
            (folder / f"{name}.png").write_bytes(buffer.getvalue())
            drawn[name] = _data_uri(buffer.getvalue())
    _, test = load_splits(RunConfig(**results["config"]["run"]))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gracekit.recipe", "assets"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.jinja").render(
        results=results,
        rows=rows(results),
        plots=drawn,
        samples=_samples(folder, results, test),
        images=len(test.images),
        total=sum(results["seconds"].values()),
    )
    write_text(folder / "report.html", page)


def _samples(folder: Path, results: dict[str, Any], test: VqaSplit) -> list[dict[str, Any]]:
    """Return questions spread evenly over the test images, each with the INT4 answers."""
    quantised = [v["name"] for v in results["variants"] if v["precision"] == "int4-qat"]
    answers = {
        name: json.loads((folder / "answers" / f"{name}.json").read_text(encoding="utf-8"))["answers"]
        for name in quantised
    }
    by_image: dict[int, list[int]] = {}
    for index, question in enumerate(test.questions):
        by_image.setdefault(question.image, []).append(index)
    images = sorted(by_image)[:: max(1, len(by_image) // SHOWN)][:SHOWN]
    samples = []
    for turn, image in enumerate(images):
        index = by_image[image][turn % len(by_image[image])]
        buffer = io.BytesIO()
        _picture(test, image).save(buffer, format="PNG")
        question = test.questions[index]
        given = [(name, answers[name][index], answers[name][index] == question.answer) for name in quantised]
        samples.append(
            {"image": _data_uri(buffer.getvalue()), "text": question.text, "answer": question.answer, "given": given}
        )
    return samples


def _picture(split: VqaSplit, scene: int) -> Image.Image:
    """Return the images of a scene side by side; a blank one where there are none."""
    images = split.images[list(split.shown[scene])]
    if not len(images):
        return Image.new("RGB", (split.images.shape[-1],) * 2, "white")
    return Image.fromarray(torch.cat(list(images), dim=-1).permute(1, 2, 0).numpy())


def _histories(results: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    return {
        v["name"]: v["history"]
        for v in results["variants"]
        if v["precision"] in ("bf16", "int4-qat") and "history" in v
    }


def _plot_losses(results: dict[str, Any]) -> Any:
    parts = {"ce": "cross-entropy", "kl": "KL", "gdkd": "L_GDKD", "rcka": "L_RCKA"}
    histories = _histories(results)
    shown = [part for part in parts if any(part in entry for h in histories.values() for entry in h)]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.2), squeeze=False)
    for axis, part in zip(axes[0], shown, strict=True):
        for name, history in histories.items():
            points = [(entry["step"], entry[part]) for entry in history if (entry.get(part) or 0.0) > 0.0]
            if points:
                losses = name.partition("-")[0]
                axis.plot(
                    *zip(*points, strict=True),
                    "--" if "int4" in name else "-",
                    color=COLOURS[losses],
                    lw=1.2,
                    label=name,
                )
        axis.set(title=parts[part], xlabel="optimiser step", yscale="log")
        axis.axvline(results["config"]["train"]["steps"], color="black", lw=0.5, ls=":")
        axis.legend(fontsize=7)
    return figure


def _plot_beta(results: dict[str, Any]) -> Any:
    histories = {name: h for name, h in _histories(results).items() if any("beta" in entry for entry in h)}
    if not histories:
        return None
    grace = results["config"]["grace"]
    taus = sorted({entry["tau"] for history in histories.values() for entry in history if entry.get("tau")})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for name, history in histories.items():
        style = "--" if "int4" in name else "-"
        for axis, part in ((left, "beta"), (right, "ema")):
            shown = [entry for entry in history if part in entry]  # no average while tau is looked for
            axis.plot(
                [e["step"] for e in shown],
                [e[part] for e in shown],
                style,
                color=COLOURS[name.partition("-")[0]],
                label=name,
            )
    for bound in ("beta_min", "beta_max"):
        left.axhline(grace[bound], color="firebrick", lw=0.8, ls=":", label=f"{bound} = {grace[bound]:g}")
    for tau in taus:
        right.axhline(tau, color="firebrick", lw=0.8, ls=":", label=f"tau = {tau:.3g}")
    left.set(title="beta", xlabel="optimiser step")
    right.set(title="moving average of L_GDKD", xlabel="optimiser step", yscale="log")
    for axis in (left, right):
        axis.legend(fontsize=7)
    return figure


def _plot_accuracy(results: dict[str, Any]) -> Any:
    variants = results["variants"]
    figure, axis = plt.subplots(figsize=(7, 0.38 * len(variants) + 1))
    names = [v["name"] for v in variants]
    values = [100 * v["accuracy"] for v in variants]
    colours = ["black" if v["name"] == "teacher" else COLOURS[v["losses"]] for v in variants]
    bars = axis.barh(names, values, color=colours)
    for bar, variant in zip(bars, variants, strict=True):
        bar.set_hatch("//" if variant["precision"].startswith("int4") else "")
        bar.set_edgecolor("white")
    axis.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlim=(0, 108), xlabel="test questions answered right, % (hatched: INT4 kernel)")
    return figure


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
