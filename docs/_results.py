"""Tables and plots of the documentation, made from the newest result files of benchmarks/results at every build.

`python docs/_results.py` also writes README's table of the recipe anew.
"""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GENERATED = Path(__file__).parent / "_generated"
START, END = "<!-- recipe table: python docs/_results.py -->\n", "<!-- end -->\n"


def newest(benchmark: str, device: str) -> dict | None:
    """The latest result of a benchmark on a device whose name contains ``device``."""
    found = sorted(RESULTS.glob(f"{benchmark}-*{device}*-????-??-??.json"), key=lambda path: path.stem[-10:])
    return json.loads(found[-1].read_text()) if found else None


def machine(result: dict) -> str:
    """One line on where and when a result was measured."""
    about = result["environment"]
    name = about["machine"].get("gpu") or f"{about['machine']['processor']}, {about['machine']['threads']} threads"
    versions = ", ".join(
        f"{package} {version}" for package, version in about["versions"].items() if package != "gracekit"
    )
    return f"{name}; {about['date']}; Python {about['python']}, {versions}"


def write_table(name: str, rows: list[dict], columns: dict[str, str]) -> None:
    """A CSV file with a header; missing cells stay empty."""
    with open(GENERATED / f"{name}.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(columns.values())
        for row in rows:
            out.writerow([row.get(key, row.get("failed", "") if key == "median_ms" else "") for key in columns])


TIMES = {
    "variant": "Variant",
    "median_ms": "Median ms",
    "min_ms": "Least",
    "max_ms": "Greatest",
    "peak_mib": "Peak MiB",
}


def losses(device: str) -> None:
    """The three benchmarks of the losses on one kind of machine."""
    for benchmark, extra in {
        "gated_dkd": {
            "times_faster_than_paper": "Times faster than the paper's formula",
            "times_traffic_limit": "Times the traffic limit",
        },
        "linear_gated_dkd": {"N": "N", "times_bare_products": "Times the bare products"},
        "relational_cka": {
            "images": "Images",
            "longest": "Longest",
            "times_faster_than_paper": "Times faster than the paper's loop",
        },
    }.items():
        result = newest(benchmark, device)
        if result is None:
            continue
        write_table(f"{benchmark}-{device}", result["rows"], TIMES | extra)
        (GENERATED / f"{benchmark}-{device}.txt").write_text(machine(result) + "\n")
        if result.get("curves"):
            plot_curves(result, device)
            points = [row for row in result["rows"] + result["curves"] if row["variant"] == "gracekit triton"]
            columns = {"N": "N", "V": "V", "median_ms": "Median ms"} | extra
            write_table(f"{benchmark}-curves-{device}", points, columns)


def qat_linear(device: str) -> None:
    """What a layer in training costs, and what it learns."""
    result = newest("qat_linear", device)
    if result is None:
        return
    (GENERATED / f"qat_linear-{device}.txt").write_text(machine(result) + "\n")
    more = {"times_plain": "Times plain"}
    if "device_ms" in result["cost"][0]:
        more |= {"device_ms": "Median ms of the device", "times_plain_on_device": "Times plain on the device"}
    more |= {"bytes_per_weight_beyond_plain": "Bytes a weight beyond plain"}
    write_table(f"qat_linear-{device}", result["cost"], TIMES | more)
    if result["learning"]:
        columns = {"variant": "Variant", "bits": "Bits", "error": "Error", "least": "Least", "greatest": "Greatest"}
        write_table(f"qat_learning-{device}", result["learning"], columns | {"scale_rate": "Rate of the scales"})


def inference(device: str) -> None:
    """Products with 4-bit weights, generation, and what one decode step is made of."""
    result = newest("int4_linear", device)
    if result is not None:
        (GENERATED / f"int4_linear-{device}.txt").write_text(machine(result) + "\n")
        write_table(f"int4_linear-{device}", *products(result))
        plot_products(result, device)
    result = newest("generate", device)
    if result is not None:
        (GENERATED / f"generate-{device}.txt").write_text(machine(result) + "\n")
        columns = {
            "batch": "Batch",
            "variant": "Variant",
            "tokens_per_second": "Tokens/s",
            "times_baseline": "Times bf16, transformers",
            "prefill_ms": "First token, ms",
            "decode_tokens_per_second": "Tokens/s after it",
            "weights_mib": "Weights, MiB",
            "cache_mib": "Cache",
            "peak_beyond_weights_mib": "Peak beyond weights",
            "failed": "Failed",
        }
        write_table(f"generate-{device}", sorted(result["rows"], key=lambda row: row["batch"]), columns)
        (GENERATED / f"generate-summary-{device}.txt").write_text(generation(result) + "\n")
    result = newest("decode_profile", device)
    if result is not None:
        (GENERATED / f"decode_profile-{device}.txt").write_text(
            f"{result['variant']}, {result['prompt']} tokens before: {result['step_us'] / 1e3:.2f} ms a step; the parts "
            f"below add up to {result['profiled_us'] / 1e3:.2f} ms; limit by traffic ({result['bytes_read'] / 2**20:.0f} MiB at "
            f"{result['copy_bandwidth_gb_s']} GB/s) {result['traffic_limit_us'] / 1e3:.2f} ms. {machine(result)}\n"
        )
        columns = {"name": "Part", "us": "us a step", "calls": "Calls a step"}
        rows = [row | {"name": f"``{row['name'][:60]}``"} for row in result["rows"][:12]]
        write_table(f"decode_profile-{device}", rows, columns)


def generation(result: dict) -> str:
    """Speed and memory of our INT4 at one prompt beside transformers' bfloat16, in a sentence."""
    of = {row["variant"]: row for row in result["rows"] if row["batch"] == 1}
    theirs, dense = of["bf16, transformers"], of.get("bf16, gracekit, compiled") or of["bf16, gracekit"]
    ours = of.get("INT4 gracekit, compiled") or of["INT4 torchao, gracekit, fused"]
    # The peak of transformers holds the cache, ours is there already.
    peaks = [row["weights_mib"] + row["peak_beyond_weights_mib"] + (row["cache_mib"] or 0) for row in (ours, theirs)]
    return (
        f"One prompt: {ours['tokens_per_second'] / theirs['tokens_per_second']:.2f} times the tokens a second of transformers in "
        f"bfloat16, {ours['tokens_per_second'] / dense['tokens_per_second']:.2f} times those of our loop in bfloat16; after the "
        f"first token {ours['decode_tokens_per_second'] / theirs['decode_tokens_per_second']:.2f} and "
        f"{ours['decode_tokens_per_second'] / dense['decode_tokens_per_second']:.2f} times; the first token takes "
        f"{ours['prefill_ms'] / dense['prefill_ms']:.2f} times as long as in bfloat16; weights, cache and the rest of the peak are "
        f"{100 * (1 - peaks[0] / peaks[1]):.0f} % less."
    )


def grace_step(device: str) -> None:
    """What a GRACE step costs beside plain distillation."""
    result = newest("grace_step", device)
    if result is None:
        return
    (GENERATED / f"grace_step-{device}.txt").write_text(machine(result) + "\n")
    more = {
        "times_baseline": "Times the baseline",
        "peak_times_baseline": "Peak, times the baseline",
        "teacher_and_sums_ms": "Teacher, ms",
        "student_forward_ms": "Student forward, ms",
        "losses_and_their_gradients_ms": "Losses and their gradients, ms",
    }
    write_table(f"grace_step-{device}", result["rows"], TIMES | more)


def products(result: dict) -> tuple[list[dict], dict[str, str]]:
    """A row for each weight and number of rows of x, a column for each way, and what the last of them comes to."""
    rows: dict[tuple[int, int, int], dict] = {}
    variants = dict.fromkeys(row["variant"] for row in result["rows"])
    for row in result["rows"]:
        cell = rows.setdefault((row["out"], row["in"], row["rows"]), {})
        cell |= {"weight": f"{row['out']} x {row['in']}", "rows": row["rows"], row["variant"]: row["median_us"]}
        cell |= {"times": row["times_faster_than_bf16"], "share": row["share_of_traffic_limit"]}
    last = list(variants)[-1]
    columns = {"weight": "Weight", "rows": "Rows"} | {name: f"{name}, us" for name in variants}
    return list(rows.values()), columns | {
        "times": f"{last}: times faster than bf16",
        "share": "Share of the traffic limit",
    }


def plot_products(result: dict, device: str) -> None:
    """Time over the number of rows, a panel for each weight."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((row["out"], row["in"]) for row in result["rows"]))
    across, down = min(len(shapes), 3), -(-len(shapes) // 3)
    figure, axes = plt.subplots(down, across, figsize=(3.3 * across, 3.2 * down), layout="constrained", squeeze=False)
    for axis in axes.flat[len(shapes) :]:
        axis.remove()
    for axis, shape in zip(axes.flat, shapes, strict=False):
        chosen = [row for row in result["rows"] if (row["out"], row["in"]) == shape]
        for variant in dict.fromkeys(row["variant"] for row in chosen):
            points = [(row["rows"], row["median_us"]) for row in chosen if row["variant"] == variant]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=variant)
        axis.axhline(chosen[0]["traffic_limit_us"], linestyle="--", color="grey", label="INT4 limit by traffic")
        axis.set(title=f"{shape[0]} x {shape[1]}", xlabel="rows", xscale="log", yscale="log")
    for row in axes:
        row[0].set_ylabel("microseconds")
    axes[0][0].legend(fontsize=7)
    figure.savefig(GENERATED / f"int4_linear-{device}.png", dpi=130)
    plt.close(figure)


def plot_curves(result: dict, device: str) -> None:
    """Time of gated_dkd over N and over V, beside the limit by memory traffic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] + result["curves"] if "failed" not in row]
    width = result["rows"][0]["V"]
    count = result["rows"][0]["N"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, over, fixed in ((axes[0], "N", ("V", width)), (axes[1], "V", ("N", count))):
        chosen = [row for row in rows if row[fixed[0]] == fixed[1]]
        for variant in ("paper", "gracekit triton"):
            points = sorted((row[over], row["median_ms"]) for row in chosen if row["variant"] == variant)
            axis.plot(*zip(*points, strict=True), marker="o", label=variant)
        limits = sorted({(row[over], row["traffic_limit_ms"]) for row in chosen})
        axis.plot(*zip(*limits, strict=True), linestyle="--", color="grey", label="limit by traffic")
        axis.set(
            xlabel=f"{over}  ({fixed[0]} = {fixed[1]:,})", ylabel="ms, forward and backward", xscale="log", yscale="log"
        )
        axis.legend()
    figure.savefig(GENERATED / f"gated_dkd-{device}.png", dpi=150)
    plt.close(figure)


def controller() -> None:
    """What targets do to the multiplier on the built-in data."""
    result = newest("controller", "cpu")
    if result is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    (GENERATED / "controller.txt").write_text(machine(result) + "\n")
    shown = []
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for row in result["rows"]:
        taus = [entry["tau"] for entry in row["history"] if entry.get("tau")]
        percent = {
            key: f"{100 * row[key]:.1f}" for key in ("share_of_steps_on_a_bound", "accuracy_bf16", "accuracy_int4")
        }
        beta = f"{row['least_beta']:.2f} to {row['greatest_beta']:.2f}"
        shown.append({"variant": row["variant"], "tau": f"{taus[-1]:.3g}", "beta": beta} | percent)
        steps = [entry["step"] for entry in row["history"]]
        axes[0].plot(steps, [entry["beta"] for entry in row["history"]], label=row["variant"])
        axes[1].plot(steps, [entry["gdkd"] for entry in row["history"]], label=row["variant"])
    axes[0].set(title="beta", xlabel="optimiser step")
    axes[1].set(title="L_GDKD", xlabel="optimiser step", yscale="log")
    axes[0].legend()
    figure.savefig(GENERATED / "controller.png", dpi=150)
    plt.close(figure)
    columns = {
        "variant": "Settings",
        "tau": "tau",
        "beta": "beta",
        "share_of_steps_on_a_bound": "Steps on a bound, %",
        "accuracy_bf16": "BF16, %",
        "accuracy_int4": "INT4, %",
    }
    write_table("controller", shown, columns)
    auto = next(row["history"] for row in result["rows"] if row["variant"] == "auto")
    (GENERATED / "controller-auto.txt").write_text(found_target(auto) + "\n")


def found_target(history: list[dict]) -> str:
    """Say what `--tau auto` found and what became of L_GDKD and beta after it."""
    after = [entry for entry in history if entry.get("tau")]
    first, last, tau = after[0], after[-1], after[0]["tau"]
    above = sum(entry["gdkd"] > tau for entry in after)
    return (
        f"Here tau was found at step {first['step']:,} of {last['step']:,}: {tau:.2f}. In the ten steps up to there L_GDKD was "
        f"{first['gdkd']:.2f} on average, in the last ten of the run {last['gdkd']:.2f}; {above} of the {len(after)} log entries "
        f"from there on are above tau. beta went from {first['beta']:.2f} to {last['beta']:.2f}."
    )


def ablation(device: str) -> None:
    """The newest ablation on a device: its tables, its plot, and how it was made."""
    result = newest("ablation", device)
    if result is None:
        return
    from gracekit.recipe.ablation_report import heading, plot, tables

    for name, rows in tables(result).items():
        with open(GENERATED / f"ablation-{name}-{device}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    plot(result).savefig(GENERATED / f"ablation-{device}.png", dpi=110)
    about, train = result["environment"], result["config"]["train"]
    packages = ", ".join(f"{name} {about['packages'][name]}" for name in ("torch", "torchao", "transformers"))
    where = f"{about['processor']}, {about['threads']} threads" if about["device"] == "cpu" else about["device"]
    (GENERATED / f"ablation-{device}.txt").write_text(
        f"{heading(result)} {result['config']['run']['train_images']:,} training images, {train['steps']} steps and "
        f"{result['config']['finish_steps']} more for the finish, batches of {train['batch_size']} images; {where}; {packages}; "
        f"{sum(result['seconds'].values()) / 60:.0f} minutes.\n"
    )


def distillation_parts(device: str) -> None:
    """Ablations with one part of GDKD switched off, beside those with both and with none."""
    runs = {name: newest(name, device) for name in ("ablation", "ablation_target", "ablation_rest")}
    if None in runs.values():
        return
    rows = []
    for name, run, method in (
        ("CE", "ablation", "ce"),
        ("CE and a plain KL divergence", "ablation", "kl"),
        ("CE and GDKD of the target class alone (``--beta_dkd 0``)", "ablation_target", "gdkd-fixed"),
        ("CE and GDKD of the other classes alone (``--alpha 0``)", "ablation_rest", "gdkd-fixed"),
        ("CE and GDKD of both", "ablation", "gdkd-fixed"),
    ):
        found = [100 * v["accuracy"] for v in runs[run]["variants"] if v["name"] == f"{method}-bf16"]
        rows.append(
            {"students": name, "mean": f"{statistics.mean(found):.2f}", "seeds": ", ".join(f"{x:.1f}" for x in found)}
        )
    write_table(f"distillation_parts-{device}", rows, {"students": "Trained with", "mean": "Mean", "seeds": "Seeds"})
    share, temperature = runs["ablation_rest"]["rest_share"], runs["ablation_rest"]["config"]["grace"]["temperature"]
    (GENERATED / f"distillation_parts-{device}.txt").write_text(
        f"The teacher leaves {100 * share:.1f} % to the classes beside the answer (the mean over the tokens of the test "
        f"questions, at T = {temperature:g}).\n"
    )


VARIANTS = {
    "ce-bf16": "CE, BF16",
    "ce-int4-rtn": "CE, INT4 RTN",
    "ce-int4-qat": "CE, INT4 QAT",
    "grace-bf16": "GRACE, BF16",
    "grace-int4-rtn": "GRACE, INT4 RTN",
    "grace-int4-qat": "GRACE, INT4 QAT",
}


def recipe_table() -> tuple[list[list[str]], str]:
    """Rows (header first) of accuracy by variant and seed, and one line on how they were made."""
    newest_of_seed = {}
    for path in sorted(RESULTS.glob("recipe-seed*-????-??-??.json"), key=lambda path: path.stem[-10:]):
        run = json.loads(path.read_text())
        newest_of_seed[run["config"]["run"]["seed"]] = run
    runs = [newest_of_seed[seed] for seed in sorted(newest_of_seed)]
    rows = [["Student", *(f"Seed {seed}" for seed in sorted(newest_of_seed)), "Mean"]]
    for name, label in VARIANTS.items():
        found = [100 * variant["accuracy"] for run in runs for variant in run["variants"] if variant["name"] == name]
        rows.append([label, *(f"{value:.2f}" for value in found), f"{sum(found) / len(found):.2f}"])
    about = runs[0]["environment"]
    teacher = next(variant for variant in runs[0]["variants"] if variant["name"] == "teacher")
    minutes = ", ".join(f"{sum(run['seconds'].values()) / 60:.1f} ({run['environment']['threads']})" for run in runs)
    packages = ", ".join(f"{name} {about['packages'][name]}" for name in ("torch", "torchao", "transformers"))
    note = (
        f"Teacher: {100 * teacher['accuracy']:.2f} %. {about['processor']}, {about['cpu_count']} cores; "
        f"minutes a run (threads): {minutes}; {packages}."
    )
    return rows, note


def recipe() -> None:
    """The recipe's table, and what is known of its teacher."""
    rows, note = recipe_table()
    with open(GENERATED / "recipe.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    (GENERATED / "recipe.txt").write_text(note + "\n")
    training = json.loads((ROOT / "src/gracekit/recipe/assets/teacher/training.json").read_text())
    (GENERATED / "teacher.txt").write_text(
        f"{training['parameters']:,} parameters, {training['config']['steps']:,} steps, "
        f"{100 * training['accuracy']:.2f} % of {training['questions']:,} test questions.\n"
    )


def readme() -> str:
    """README with the recipe's table as the result files have it."""
    rows, note = recipe_table()
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    before, rest = (ROOT / "README.md").read_text().split(START)
    return (
        before
        + START
        + "\nTest accuracy in per cent:\n\n"
        + "\n".join(lines)
        + "\n\n"
        + note
        + "\n"
        + END
        + rest.split(END)[1]
    )


def build(*_: object) -> None:
    """Make everything the pages include."""
    GENERATED.mkdir(exist_ok=True)
    recipe()
    controller()
    for device in ("nvidia-h200", "nvidia-h100", "cpu"):
        losses(device)
        qat_linear(device)
        grace_step(device)
        inference(device)
        ablation(device)
        distillation_parts(device)


if __name__ == "__main__":
    build()
    (ROOT / "README.md").write_text(readme())
