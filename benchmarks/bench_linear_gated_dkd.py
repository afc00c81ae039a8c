"""linear_gated_dkd against full logits and released peers (which do less: no gate, no split of the target).

python benchmarks/bench_linear_gated_dkd.py                # on CUDA: N=4096, V=151,936, d=1536 and 3584, bfloat16
python benchmarks/bench_linear_gated_dkd.py --device cpu   # float32, a size for two cores
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import _harness
import reference

import gracekit


def problem(count, classes, student, teacher, device, dtype):
    torch.manual_seed(0)

    def random(*shape, scale):
        return (scale * torch.randn(*shape, device=device)).to(dtype)

    return (
        random(count, student, scale=1.0).requires_grad_(),
        random(classes, student, scale=3.0 * student**-0.5).requires_grad_(),
        random(count, teacher, scale=1.0),
        random(classes, teacher, scale=3.0 * teacher**-0.5),
        torch.randint(classes, (count,), device=device),
    )


def products(hidden, head, teacher_hidden, teacher_head, labels):
    """The bare matrix products that any way to the gradients needs, in blocks of 1024 tokens."""
    with torch.no_grad():
        for start in range(0, len(hidden), 1024):
            rows = slice(start, start + 1024)
            logits, _ = F.linear(hidden[rows], head), F.linear(teacher_hidden[rows], teacher_head)
            logits @ head, logits.T @ hidden[rows]


def from_logits(distillation):
    def loss(hidden, head, teacher_hidden, teacher_head, labels):
        logits, teacher_logits = F.linear(hidden, head), F.linear(teacher_hidden, teacher_head)
        return F.cross_entropy(logits.float(), labels) + distillation(logits, teacher_logits, labels)

    return loss


def liger(chunk: int, compiled: bool):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.0, compiled=compiled, chunk_size=chunk
    )

    def run(hidden, head, teacher_hidden, teacher_head, labels):
        return loss(hidden, head, teacher_hidden, teacher_head, labels)

    return run


def trl():
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run(hidden, head, teacher_hidden, teacher_head, labels):
        divergence, _ = ChunkedDivergenceFunction.apply(
            hidden, head, None, teacher_hidden, teacher_head, None, 0.0, 2.0
        )
        return divergence.mean()

    return run


def variants(device: str) -> dict:
    paper = from_logits(reference.paper_gated_dkd)
    compiled = {"full logits, paper, torch.compile": torch.compile(paper)} if device == "cuda" else {}
    found = {
        "full logits, paper": paper,
        **compiled,
        "full logits, gracekit": from_logits(gracekit.gated_dkd),
        "gracekit": lambda *inputs: gracekit.linear_gated_dkd(*inputs).total,
        "gracekit, gate_sum given": lambda *inputs: (
            gracekit.linear_gated_dkd(*inputs, gate_sum=torch.tensor(float(len(inputs[0])), device=device)).total
        ),
    }
    peers = {
        "Liger fused JSD and CE": lambda: liger(1024, False),
        "Liger fused JSD and CE, compiled": lambda: liger(1024, True),
        "trl chunked KL, no CE": trl,
    }
    for name, make in peers.items():
        try:
            found[name] = make()
        except (
            Exception
        ) as reason:  # a peer that is absent, or that its own imports keep from loading: in the file as such
            found[name] = reason
    return found


def bench(name, loss, inputs, device, runs, base):
    row = {"variant": name, "N": len(inputs[0]), "V": len(inputs[1]), "dtype": str(inputs[0].dtype)}
    try:
        if isinstance(loss, Exception):
            raise loss
        row |= _harness.measure(lambda: torch.autograd.grad(loss(*inputs), inputs[:2]), device, runs=runs, warmup=2)
    except Exception as reason:  # a peer that fails is a result too
        row["failed"] = f"{type(reason).__name__}: {reason}".splitlines()[0][:200]
    else:
        row["times_bare_products"] = round(row["median_ms"] / base["median_ms"], 3)
    _harness.show(row)
    return row


def main() -> None:
    parser = _harness.parser(__doc__.splitlines()[0])
    options = parser.parse_args()
    cuda = options.device == "cuda"
    count, classes, student, teacher = (4096, 151_936, 1536, 3584) if cuda else (256, 16_000, 256, 512)
    dtype = torch.bfloat16 if cuda else torch.float32
    rows = []
    for tokens in (count, 32_768) if cuda else (count,):
        inputs = problem(tokens, classes, student, teacher, options.device, dtype)
        runs = options.runs if tokens == count else 3
        base = _harness.measure(lambda inputs=inputs: products(*inputs), options.device, runs=runs)
        rows.append({"variant": "bare matrix products", "N": tokens, "V": classes, "dtype": str(dtype), **base})
        _harness.show(rows[-1])
        for name, loss in variants(options.device).items():
            if tokens == count or "full logits" not in name:
                rows.append(bench(name, loss, inputs, options.device, runs, base))
        del inputs
    _harness.write(
        "linear_gated_dkd", options.device, {"d_student": student, "d_teacher": teacher, "rows": rows}, options.output
    )


if __name__ == "__main__":
    main()
