"""The bfloat16 forms of RelationalCKA against the plain one; their mathematics runs on the CPU too."""

import sys

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds

from gracekit import RelationalCKA
from gracekit.losses import _bfloat16_cka

RELATIONAL = sys.modules["gracekit.losses.relational_cka"]
UNIT = 2.0**-9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = {"gram": _bfloat16_cka.GramSimilarity, "features": _bfloat16_cka.FeatureSimilarity}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Take one bfloat16 form, wherever the tokens are."""
    taken = []
    monkeypatch.setattr(RELATIONAL, "_on_tensor_cores", lambda *tokens: True)
    monkeypatch.setattr(RELATIONAL, "_gram_is_cheaper", lambda *tokens: taken.append(1) or request.param == "gram")
    yield request.param
    assert taken


def related(seed, n, dx, dy):
    """Tokens of two sides that share some of their structure, each with a common offset, as those of a model."""
    shared = normal(seed, n, 4)
    x = shared @ normal(seed + 1, 4, dx) + normal(seed + 2, n, dx) + normal(seed + 3, 1, dx)
    y = shared @ normal(seed + 4, 4, dy) + normal(seed + 5, n, dy) + normal(seed + 6, 1, dy)
    return x.bfloat16().to(DEVICE), y.bfloat16().to(DEVICE)


@pytest.mark.parametrize("lengths", [[12, 12], [12, 3, 7, 0, 20]])
def test_values_and_gradients_lie_within_a_few_roundoffs_of_the_oracle(form, lengths):
    x, y = related(1, sum(lengths), 24, 40)
    x.requires_grad_()
    loss = RelationalCKA()(x, y, lengths)
    loss.backward()
    exact = x.detach().double().cpu().requires_grad_()
    counted = [pair for pair in zip(exact.split(lengths), y.cpu().split(lengths), strict=True) if len(pair[0]) >= 4]
    expected = torch.stack([1 - reference.cka(*pair) for pair in counted]).mean()
    expected.backward()
    assert abs(loss.item() - expected.item()) <= 2 * UNIT
    error = (x.grad.double().cpu() - exact.grad).norm() / exact.grad.norm()
    assert error <= 8 * UNIT


@pytest.mark.parametrize("huge", [(60.0, 0.0), (0.0, 100.0), (0.0, 1e3), (0.0, 3e3), (30.0, 1e3)])
def test_the_bounds_hold_beside_a_common_component_or_a_huge_dimension(form, huge):
    """Hidden states of real models have both: a mean far from zero, and a few dimensions a thousand times the others."""
    x, y = related(1, 144, 96, 128)
    for side in (x, y):
        side += huge[0]
        side[:, 7] += huge[1]
    x.requires_grad_()
    loss = RelationalCKA()(x, y)
    loss.backward()
    exact = x.detach().double().cpu().requires_grad_()
    expected = 1 - reference.cka(exact, y.cpu())
    expected.backward()
    assert abs(loss.item() - expected.item()) <= 2 * UNIT
    assert (x.grad.double().cpu() - exact.grad).norm() <= 8 * UNIT * exact.grad.norm()


def test_tokens_that_are_nearly_one_point_are_told_from_those_that_are_one(form):
    """A centred Gram matrix of squares 4.8e-7 is above the documented 1e-8, and its image counts as in the plain form."""
    x, y = normal(1, 576, 256), normal(2, 576, 256)
    x[:, 0] = 4000.0
    x, y = x.bfloat16(), y.bfloat16()
    assert (
        abs(RelationalCKA()(x.to(DEVICE), y.to(DEVICE)).item() - (1 - reference.cka(x.double(), y.double())).item())
        <= 2 * UNIT
    )


def test_a_token_that_is_not_finite_shows_in_the_loss(form):
    x, y = related(1, 12, 8, 12)
    x[0, 0] = torch.nan
    assert RelationalCKA()(x, y, [6, 6]).isnan()


@given(seeds, st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(2, 12), st.integers(2, 12))
def test_both_forms_agree_with_the_plain_one(seed, lengths, dx, dy):
    x, y = related(seed, sum(lengths), dx, dy)
    x.requires_grad_()
    plain = RelationalCKA()(x, y, lengths)
    for gram in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RELATIONAL, "_on_tensor_cores", lambda *tokens: True)
            patch.setattr(RELATIONAL, "_gram_is_cheaper", lambda *tokens, gram=gram: gram)
            fast = RelationalCKA()(x, y, lengths)
            (gradient,) = torch.autograd.grad(fast, x)
        assert abs(fast.item() - plain.item()) <= 2 * UNIT
        assert gradient.isfinite().all()


def test_kernels_around_the_products_equal_the_plain_operations(monkeypatch):
    pytest.importorskip("triton")
    x, y = related(1, 2 * 150, 70, 40)
    x, y = x.reshape(2, 150, 70), y.reshape(2, 150, 40)
    mask = torch.arange(150, device=DEVICE) < torch.tensor([[150], [131]], device=DEVICE)
    counts = mask.sum(1)
    x, y = x * mask[..., None], y * mask[..., None]
    slope = normal(7, 2, 150, 70).to(DEVICE).bfloat16()
    results = []
    for kernels in (False, True):
        monkeypatch.setattr(_bfloat16_cka, "_kernels", lambda tokens, on=kernels: on)
        both, inverse = _bfloat16_cka._centred_pair(x, y, mask, counts)
        tangent = slope.clone()
        _bfloat16_cka._to_tangent(x, inverse, torch.tensor([0.5, 2.0], device=DEVICE), tangent)
        results.append((both, inverse, tangent))
    torch.testing.assert_close(*results, rtol=2.0**-7, atol=1e-5)


def test_a_padded_batch_ignores_what_the_mask_leaves_out(form):
    x, y = related(1, 11, 8, 12)
    packed = RelationalCKA()(x, y, [5, 6])
    mask = torch.tensor([[True] * 5 + [False], [True] * 6], device=DEVICE)
    batch_x, batch_y = (side.new_full((2, 6, side.shape[1]), torch.nan) for side in (x, y))
    batch_x[mask], batch_y[mask] = x, y
    batch_x.requires_grad_()
    padded = RelationalCKA()(batch_x, batch_y, mask=mask)
    padded.backward()
    torch.testing.assert_close(padded, packed)
    assert batch_x.grad.isfinite().all()
    assert (batch_x.grad[0, 5] == 0).all()


def test_collapsed_images_are_left_out_without_a_nan(form):
    good, teacher = related(1, 12, 8, 12)
    student = torch.cat((good[:6], good[:1].expand(6, -1))).requires_grad_()
    loss = RelationalCKA()(student, teacher, [6, 6])
    loss.backward()
    torch.testing.assert_close(loss.detach(), RelationalCKA()(good[:6], teacher[:6]))
    assert student.grad.isfinite().all()
    assert (student.grad[6:] == 0).all()


def test_zero_tokens_and_no_images_are_harmless(form):
    x, y = related(1, 6, 8, 12)
    x[2] = 0
    x.requires_grad_()
    RelationalCKA()(x, y).backward()
    assert x.grad.isfinite().all()
    tokens = x.detach().requires_grad_()
    loss = RelationalCKA()(tokens, y, [3, 3])
    loss.backward()
    assert loss.item() == 0.0
    assert (tokens.grad == 0).all()


def test_a_second_derivative_is_refused(form):
    x, y = related(1, 6, 8, 12)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(RelationalCKA()(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="RelationalCKA .* cannot be differentiated twice"):
        gradient.float().square().sum().backward()


def test_the_plain_form_serves_what_tensor_cores_do_not():
    x, y = related(1, 6, 8, 12)
    assert RELATIONAL._on_tensor_cores(x, y) == (DEVICE == "cuda")
    assert not RELATIONAL._on_tensor_cores(x.half(), y.half())
    assert not RELATIONAL._on_tensor_cores(x, y.float())
