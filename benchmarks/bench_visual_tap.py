"""What capturing the penultimate layer's visual tokens costs in a training step: the tap against output_hidden_states=True.

Forward and backward of a loss on the logits and on the visual tokens, random weights, no optimiser; "none" has the logits only.

python benchmarks/bench_visual_tap.py                  # on CUDA: LLaVA-1.5-7B and Qwen2-VL-2B in bfloat16
python benchmarks/bench_visual_tap.py --device cpu     # tiny models in float32
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import _harness
import tiny_models
from _models import built, llava_7b, qwen2_vl_2b

from gracekit.vlm import VisualTokenTap

SAMPLES, TEXT = 2, 448
TINY = ["I" + 200 * "t"] * 8


def batch_of(config, pixels, tokens):
    """SAMPLES samples of one image of ``tokens`` tokens, and text after it."""
    text = torch.randint(5, 1000, (SAMPLES, TEXT))
    ids = torch.cat([torch.full((SAMPLES, tokens), config.image_token_id), text], dim=1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if "image_grid_thw" in pixels:
        batch["mm_token_type_ids"] = (ids == config.image_token_id).int()
    return batch


def llava_7b_batch(model):
    return batch_of(model.config, {"pixel_values": torch.randn(SAMPLES, 3, 336, 336)}, 576)


def qwen2_vl_2b_batch(model):
    grids = torch.tensor([[1, 48, 48]] * SAMPLES)
    return batch_of(
        model.config, {"pixel_values": torch.randn(SAMPLES * 48 * 48, 1176), "image_grid_thw": grids}, 24 * 24
    )


MODELS = {
    "cuda": {"LLaVA-1.5-7B": (llava_7b, llava_7b_batch), "Qwen2-VL-2B": (qwen2_vl_2b, qwen2_vl_2b_batch)},
    "cpu": {
        "tiny LLaVA": (
            lambda: tiny_models.tiny_llava(width=256, layers=8),
            lambda model: tiny_models.llava_batch(model, TINY),
        ),
        "tiny Qwen2-VL": (
            lambda: tiny_models.tiny_qwen2_vl(
                width=256,
                layers=8,
                rope_parameters={"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e4},
            ),
            lambda model: tiny_models.qwen2_vl_batch(model, TINY),
        ),
    },
}


def step(model, batch, variant):
    """One forward and backward; gradients are let go of, so that the peak holds them and what is there before does not."""
    with VisualTokenTap(model) if variant == "tap" else _Nothing() as tap:
        out = model(**batch, use_cache=False, output_hidden_states=variant == "output_hidden_states")
        loss = out.logits.float().square().mean()
        if variant == "tap":
            loss = loss + tap.tokens(batch)[0].float().square().mean()
        elif variant == "output_hidden_states":
            visual = batch["input_ids"] == model.config.image_token_id
            loss = loss + out.hidden_states[-2][visual].float().square().mean()
        del out
    loss.backward()
    model.zero_grad(set_to_none=True)


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None


def bench(name, build, make_batch, device, dtype, runs):
    torch.manual_seed(0)
    model = built(build, device, dtype).train()
    batch = {
        key: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for key, value in make_batch(model).items()
    }
    rows = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny_models.checkpoint_activations(model, reentrant=False)
        for variant in ("none", "tap", "output_hidden_states"):
            row = {"model": name, "variant": variant, "checkpointing": checkpointing}
            row["samples"], row["length"] = batch["input_ids"].shape
            row["visual_tokens"] = int((batch["input_ids"] == model.config.image_token_id).sum())
            row |= _harness.measure(lambda variant=variant: step(model, batch, variant), device, runs=runs)
            base = row if variant == "none" else rows[-1 if variant == "tap" else -2]
            row["times_none"] = round(row["median_ms"] / base["median_ms"], 4)
            row["mib_over_none"] = round(row["peak_mib"] - base["peak_mib"], 1)
            _harness.show(row)
            rows.append(row)
    return rows


def main() -> None:
    given = _harness.parser(__doc__).parse_args()
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    rows = []
    for name, (build, make_batch) in MODELS[given.device].items():
        rows += bench(name, build, make_batch, given.device, dtype, given.runs)
        gc.collect()
        if given.device == "cuda":
            torch.cuda.empty_cache()
        # After every model, so that a run that is cut short leaves what it has measured.
        _harness.write("visual_tap", given.device, {"dtype": str(dtype), "rows": rows}, given.output)


if __name__ == "__main__":
    main()
