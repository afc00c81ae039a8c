"""Oracles: float64, textbook order, one token or image at a time. They share nothing with the package."""

import torch
from torch import Tensor


def _target_rest_log(logits: Tensor, label: int) -> tuple[Tensor, Tensor, Tensor]:
    """log p_y, log(1 - p_y) and the log-probabilities renormalised without y, of one token."""
    others = torch.cat((logits[:label], logits[label + 1 :]))
    everything, rest = torch.logsumexp(logits, 0), torch.logsumexp(others, 0)
    # The larger of the two probabilities is one minus the smaller: near 1 its logarithm is minus the other probability.
    log_yes, log_no = logits[label] - everything, rest - everything
    if log_yes > log_no:
        log_yes = torch.log1p(-torch.exp(log_no))
    else:
        log_no = torch.log1p(-torch.exp(log_yes))
    return log_yes, log_no, others - rest


def dkd_parts(student: Tensor, teacher: Tensor, label: int, temperature: float) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of one token."""
    s_yes, s_no, s_hat = _target_rest_log(student.double() / temperature, label)
    t_yes, t_no, t_hat = _target_rest_log(teacher.double() / temperature, label)
    tckd = t_yes.exp() * (t_yes - s_yes) + t_no.exp() * (t_no - s_no)
    nckd = (t_hat.exp() * (t_hat - s_hat)).sum()
    return tckd, nckd


def gate(teacher: Tensor) -> Tensor:
    """exp(-H / log V) of one token."""
    log_p = torch.log_softmax(teacher.double(), 0)
    entropy = -(log_p.exp() * log_p).sum()
    return torch.exp(-entropy / torch.tensor(float(len(teacher)), dtype=torch.float64).log())


def gated_dkd_tokens(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta: float = 4.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Loss and gate of every supervised token, (tokens,) each."""
    losses, gates = [], []
    for index, label in enumerate(labels.tolist()):
        if label == ignore_index:
            continue
        tckd, nckd = dkd_parts(student[index], teacher[index], label, temperature)
        losses.append(temperature**2 * (alpha * tckd + beta * nckd))
        gates.append(gate(teacher[index]))
    return torch.stack(losses), torch.stack(gates)


def gated_dkd(student: Tensor, teacher: Tensor, labels: Tensor, **options: float) -> Tensor:
    """Gate-weighted mean."""
    losses, gates = gated_dkd_tokens(student, teacher, labels, **options)
    return (gates * losses).sum() / gates.sum()


def hsic(k: Tensor, other: Tensor, *, unbiased: bool = False) -> Tensor:
    """Biased as a trace with the centring matrix; unbiased by Song et al.'s sums over matrices without diagonal."""
    n = len(k)
    if not unbiased:
        h = torch.eye(n, dtype=k.dtype) - torch.ones(n, n, dtype=k.dtype) / n
        return torch.trace(k @ h @ other @ h) / (n - 1) ** 2
    k, other = k - torch.diag(torch.diag(k)), other - torch.diag(torch.diag(other))
    ones = torch.ones(n, dtype=k.dtype)
    total = torch.trace(k @ other)
    total = total + (ones @ k @ ones) * (ones @ other @ ones) / ((n - 1) * (n - 2))
    total = total - 2 / (n - 2) * (ones @ k @ other @ ones)
    return total / (n * (n - 3))


def cka(x: Tensor, y: Tensor, *, unbiased: bool = False, normalize: bool = True) -> Tensor:
    x, y = x.double(), y.double()
    if normalize:
        x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    k, other = x @ x.T, y @ y.T
    cross = hsic(k, other, unbiased=unbiased)
    return cross / (hsic(k, k, unbiased=unbiased) * hsic(other, other, unbiased=unbiased)).sqrt()


def paper_gated_dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 2.0, beta: float = 4.0
) -> Tensor:
    """The loss as the paper writes it, in tensor operations: float32 copies, softmaxes, the target scattered out.

    The baseline of the benchmarks, with nothing kept or made that a careful writer would not. Every token is supervised.
    """
    target = labels[:, None]

    def yes_and_rest(logits: Tensor) -> tuple[Tensor, Tensor]:
        scaled = logits / temperature
        yes = torch.log_softmax(scaled, 1).gather(1, target).exp()
        return yes, torch.log_softmax(scaled.scatter(1, target, -1e4), 1)

    with torch.no_grad():
        log_p = torch.log_softmax(teacher.float(), 1)
        entropy = -(log_p.exp() * log_p).sum(1)
        gates = torch.exp(-entropy / torch.tensor(float(teacher.shape[1])).log())
        del log_p
        yes_t, log_rest_t = yes_and_rest(teacher.float())
    yes_s, log_rest_s = yes_and_rest(student.float())
    tckd = yes_t * (yes_t / yes_s).log() + (1 - yes_t) * ((1 - yes_t) / (1 - yes_s).clamp_min(1e-8)).log()
    nckd = (log_rest_t.exp() * (log_rest_t - log_rest_s)).sum(1)
    losses = temperature**2 * (tckd[:, 0] + beta * nckd)
    return (gates * losses).sum() / gates.sum()


def paper_gated_dkd_line_by_line(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 2.0, beta: float = 4.0
) -> Tensor:
    """The same, each line of the paper a line of code, and autograd left to keep what it likes."""
    student, teacher = student.float(), teacher.float()
    target = labels[:, None]
    log_s, log_t = (torch.log_softmax(side / temperature, 1) for side in (student, teacher))
    yes_s, yes_t = log_s.gather(1, target).exp(), log_t.gather(1, target).exp()
    tckd = yes_t * (yes_t / yes_s).log() + (1 - yes_t) * ((1 - yes_t) / (1 - yes_s).clamp_min(1e-8)).log()
    rest_s, rest_t = (
        side / temperature - 1e4 * torch.zeros_like(side).scatter(1, target, 1.0) for side in (student, teacher)
    )
    log_rest_s, log_rest_t = torch.log_softmax(rest_s, 1), torch.log_softmax(rest_t, 1)
    nckd = (log_rest_t.exp() * (log_rest_t - log_rest_s)).sum(1)
    log_p = torch.log_softmax(teacher, 1)
    entropy = -(log_p.exp() * log_p).sum(1)
    gates = torch.exp(-entropy / torch.tensor(float(teacher.shape[1])).log()).detach()
    losses = temperature**2 * (tckd[:, 0] + beta * nckd)
    return (gates * losses).sum() / gates.sum()


def paper_relational(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean of 1 - CKA as the paper writes it: one image after the other, float32, centred Gram matrices and their traces."""
    losses = []
    for x, y in zip(student, teacher, strict=True):
        x, y = torch.nn.functional.normalize(x.float(), dim=1), torch.nn.functional.normalize(y.float(), dim=1)
        # H K H by means of rows and columns: a product with the dense H would time something nobody runs.
        k, other = (
            gram - gram.mean(0, keepdim=True) - gram.mean(1, keepdim=True) + gram.mean() for gram in (x @ x.T, y @ y.T)
        )
        similarity = (k * other).sum() / ((k * k).sum() * (other * other).sum()).sqrt().clamp_min(1e-8)
        losses.append(1 - similarity)
    return torch.stack(losses).mean()
