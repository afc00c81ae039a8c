"""cka and RelationalCKA against a float64 oracle, at their edges, and with bad input."""

import math
import sys

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds
from tolerances import GRADIENT, VALUE
from torch._subclasses.fake_tensor import FakeTensorMode

from gracekit import RelationalCKA, cka
from gracekit.losses import _image_batches

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize(("n", "dx", "dy"), [(9, 40, 30), (60, 8, 5), (12, 12, 3)])
def test_value_and_gradient_equal_the_oracle(dtype, estimator, n, dx, dy):
    x, y = normal(1, n, dx, dtype=dtype), normal(2, n, dy, dtype=dtype)
    y[:, :3] += x[:, :3]
    x.requires_grad_()
    value = cka(x, y, estimator=estimator)
    (gradient,) = torch.autograd.grad(value, x)
    exact = x.detach().double().requires_grad_()
    expected = reference.cka(exact, y, unbiased=estimator == "unbiased")
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.detach().double(), expected.detach(), **VALUE[dtype])
    torch.testing.assert_close(gradient.double(), expected_gradient, **GRADIENT[dtype])


@pytest.mark.parametrize("normalize", [True, False])
def test_gram_and_feature_space_forms_agree(normalize, monkeypatch):
    module = sys.modules["gracekit.losses.relational_cka"]
    x, y = normal(1, 14, 11).requires_grad_(), normal(2, 14, 9)
    results = []
    for form in (module._gram_hsic, module._feature_hsic):
        monkeypatch.setattr(module, "_gram_hsic", form)
        monkeypatch.setattr(module, "_feature_hsic", form)
        for estimator in ("biased", "unbiased"):
            value = cka(x, y, estimator=estimator, normalize=normalize)
            results.append((value.detach(), torch.autograd.grad(value, x)[0]))
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3])
    assert results[0][0] != results[1][0]


def test_the_cheaper_form_is_taken(monkeypatch):
    module = sys.modules["gracekit.losses.relational_cka"]
    taken = []
    for name in ("_gram_hsic", "_feature_hsic"):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda x, y, name=name, original=original: taken.append(name) or original(x, y)
        )
    cka(normal(1, 10, 100), normal(2, 10, 100))
    cka(normal(1, 400, 10), normal(2, 400, 10))
    assert taken == ["_gram_hsic", "_feature_hsic"]


def test_without_normalisation_it_is_the_released_cka_package():
    """pytorch-cka computes the unbiased estimator of unnormalised features."""
    peer = pytest.importorskip("cka")
    x, y = normal(1, 20, 7, dtype=torch.float32), normal(2, 20, 9, dtype=torch.float32)
    y[:, :5] += x[:, :5]
    theirs = peer.cka_from_features(x, y).squeeze()
    ours = cka(x, y, estimator="unbiased", normalize=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert theirs > 0.05


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_gradcheck_in_float64(estimator):
    x, y = normal(1, 6, 4).requires_grad_(), normal(2, 6, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: cka(a, b, estimator=estimator), (x, y))
    criterion = RelationalCKA(estimator=estimator)
    tokens, teacher = normal(3, 13, 4).requires_grad_(), normal(4, 13, 5)
    assert torch.autograd.gradcheck(lambda a: criterion(a, teacher, lengths=[5, 2, 6]), tokens)


def test_a_second_derivative_is_right():
    x, y = normal(1, 6, 4).requires_grad_(), normal(2, 6, 5)
    assert torch.autograd.gradgradcheck(lambda a: cka(a, y), x)


@pytest.mark.parametrize("spread", [0.0, 1e-4])
def test_collapsed_images_are_left_out_without_a_nan(spread):
    """1e-4 around a common token: a centred Gram matrix of squares near 1e-15."""
    good, teacher = normal(1, 6, 5, dtype=torch.float32), normal(2, 12, 7, dtype=torch.float32)
    collapsed = torch.ones(6, 5) + spread * normal(3, 6, 5, dtype=torch.float32)
    student = torch.cat((good, collapsed)).requires_grad_()
    criterion = RelationalCKA()
    loss = criterion(student, teacher, lengths=[6, 6])
    loss.backward()
    torch.testing.assert_close(loss.detach(), criterion(good, teacher[:6]))
    assert student.grad.isfinite().all()
    assert (student.grad[6:] == 0).all()
    assert (student.grad[:6] != 0).any()


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e12])
def test_without_normalisation_the_size_of_the_features_changes_nothing(size, estimator):
    x, y = normal(1, 12, 5, dtype=torch.float32), normal(2, 12, 7, dtype=torch.float32)
    y[:, :3] += x[:, :3]
    scaled = (size * x).requires_grad_()
    value = cka(scaled, y / size, estimator=estimator, normalize=False)
    (gradient,) = torch.autograd.grad(value, scaled)
    exact = x.double().requires_grad_()
    expected = reference.cka(exact, y, unbiased=estimator == "unbiased", normalize=False)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(value.detach().double(), expected.detach(), **VALUE[torch.float32])
    torch.testing.assert_close(size * gradient.double(), expected_gradient, **GRADIENT[torch.float32])
    criterion = RelationalCKA(estimator=estimator, normalize=False)
    padded, mask = torch.full((1, 15, 5), math.nan), torch.arange(15)[None] < 12
    padded[:, :12] = scaled.detach()
    loss = criterion(padded, torch.nn.functional.pad(y / size, (0, 0, 0, 3))[None], mask=mask)
    torch.testing.assert_close(1 - loss.double(), expected.detach(), **VALUE[torch.float32])


def test_without_normalisation_rows_are_equal_by_what_distinguishes_them_beside_their_size():
    x, y = normal(3, 6, 5, dtype=torch.float32), normal(1, 6, 4, dtype=torch.float32)
    far = 300 + x
    torch.testing.assert_close(
        cka(far, y, normalize=False).double(), reference.cka(far, y, normalize=False), rtol=1e-4, atol=0
    )
    equal = (1e4 + 1e-3 * x).requires_grad_()  # all but a few differ by no more than rounding
    value = cka(equal, y, normalize=False)
    (gradient,) = torch.autograd.grad(value, equal)
    assert value.item() == 0.0
    assert (gradient == 0).all()


def test_cka_of_collapsed_rows_is_zero_without_gradient():
    x = torch.ones(5, 3, requires_grad=True)
    value = cka(x, normal(1, 5, 4, dtype=torch.float32))
    value.backward()
    assert value.item() == 0.0
    assert (x.grad == 0).all()


def test_no_image_left_gives_zero_attached_to_the_graph():
    for lengths in ([], [3], [1, 2]):
        tokens = normal(1, sum(lengths), 5).requires_grad_()
        loss = RelationalCKA()(tokens, normal(2, sum(lengths), 6), lengths=lengths)
        loss.backward()
        assert loss.item() == 0.0
        assert (tokens.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_of_zeros_has_no_direction_and_no_gradient(dtype):
    """It stays where it is among the others; a step towards any direction would be as good as one away from it."""
    tokens, teacher = normal(1, 6, 5, dtype=dtype), normal(2, 6, 6, dtype=dtype)
    tokens[2] = 0
    units = torch.where((tokens == 0).all(1, keepdim=True), 0, tokens / tokens.norm(dim=1, keepdim=True))
    expected = reference.cka(units.double(), torch.nn.functional.normalize(teacher.double(), dim=1), normalize=False)
    value = cka(tokens.requires_grad_(), teacher)
    value.backward()
    torch.testing.assert_close(value.detach().double(), expected, **VALUE[dtype])
    assert (tokens.grad[2] == 0).all()
    assert 0 < tokens.grad.norm() < 10


@pytest.mark.parametrize("size", [1e-18, 1e-9, 1e18])
def test_the_size_of_normalised_tokens_changes_nothing(size):
    x, y = normal(1, 12, 5, dtype=torch.float32), normal(2, 12, 7, dtype=torch.float32)
    torch.testing.assert_close(cka(size * x, y / size), cka(x, y), **VALUE[torch.float32])


def test_a_list_and_a_tensor_of_lengths_agree():
    x, y = normal(1, 11, 5), normal(2, 11, 6)
    torch.testing.assert_close(RelationalCKA()(x, y, [5, 6]), RelationalCKA()(x, y, torch.tensor([5, 6])))


def test_images_of_equal_length_need_no_padding():
    x, y = normal(1, 12, 5), normal(2, 12, 6)
    torch.testing.assert_close(
        RelationalCKA()(x, y, [6, 6]), RelationalCKA()(x.reshape(2, 6, 5), y.reshape(2, 6, 6)), rtol=0, atol=0
    )


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), seeds)
def test_packed_images_are_computed_in_groups_of_similar_size_and_give_what_each_gives_alone(counts, seed):
    groups = _image_batches._similar(counts)
    assert sorted(index for group in groups for index in group) == list(range(len(counts)))
    for group in groups:
        found = [counts[index] for index in group if counts[index]]
        assert not found or min(found) >= 0.7 * max(found)
    x, y = normal(seed, sum(counts), 5).requires_grad_(), normal(seed + 1, sum(counts), 7)
    criterion = RelationalCKA()
    pairs = zip(x.split(counts), y.split(counts), strict=True)
    alone = [criterion(own, other) for own, other in pairs if len(own) >= 4]
    expected = torch.stack(alone).mean() if alone else 0.0 * x.sum()
    loss = criterion(x, y, counts)
    torch.testing.assert_close(loss, expected, **VALUE[torch.float64])
    got, wanted = (torch.autograd.grad(value, x)[0] for value in (loss, expected))
    torch.testing.assert_close(got, wanted, **GRADIENT[torch.float64])


def test_min_tokens_leaves_small_images_out():
    x, y = normal(1, 9, 5), normal(2, 9, 6)
    loss = RelationalCKA(min_tokens=5)(x, y, [4, 5])
    torch.testing.assert_close(loss, 1 - cka(x[4:], y[4:]))
    assert RelationalCKA(min_tokens=10)(x, y).item() == 0.0


def test_no_gradient_reaches_the_teacher():
    x, y = normal(1, 6, 5).requires_grad_(), normal(2, 6, 5).requires_grad_()
    RelationalCKA()(x, y).backward()
    assert y.grad is None


def test_packed_images_of_unlike_sizes_run_on_fake_tensors():
    with FakeTensorMode():
        tokens = torch.zeros(11, 5, requires_grad=True)
        loss = RelationalCKA()(tokens, torch.zeros(11, 6), lengths=[4, 7])
        loss.backward()
    assert loss.shape == ()
    assert tokens.grad.shape == (11, 5)


def test_runs_on_meta_tensors_so_nothing_reads_a_value():
    tokens = torch.zeros(11, 5, device="meta", requires_grad=True)
    teacher = torch.zeros(11, 6, device="meta")
    RelationalCKA()(tokens, teacher, lengths=[5, 6]).backward()
    assert tokens.grad.shape == (11, 5)
    batch = torch.zeros(2, 5, 5, device="meta")
    assert RelationalCKA()(batch, batch, mask=torch.ones(2, 5, dtype=torch.bool, device="meta")).shape == ()


def test_compiles_into_one_graph():
    criterion = RelationalCKA()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    x, y = normal(1, 11, 5).requires_grad_(), normal(2, 11, 6)
    for lengths in ([5, 6], [4, 7], [3, 3, 5], None):
        results = [
            (loss.detach(), torch.autograd.grad(loss, x)[0])
            for f in (criterion, compiled)
            for loss in [f(x, y, lengths)]
        ]
        torch.testing.assert_close(*results)


def test_runs_under_autocast_in_full_precision():
    x, y = normal(1, 9, 5, dtype=torch.float32), normal(2, 9, 6, dtype=torch.float32)
    outside = RelationalCKA()(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        inside = RelationalCKA()(x, y)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_prints_its_constructor():
    criterion = RelationalCKA(estimator="unbiased", normalize=False, min_tokens=7)
    assert repr(eval(repr(criterion), {"RelationalCKA": RelationalCKA})) == repr(criterion)


X, Y = torch.zeros(6, 5), torch.zeros(6, 7)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.long(), Y), {}, TypeError, "student_tokens must have a floating dtype, got torch.int64"),
        ((X, None), {}, TypeError, "teacher_tokens must be a torch.Tensor, got NoneType"),
        ((X[0], Y[0]), {}, ValueError, r"student_tokens must have shape \(n, d_S\) or \(B, n, d_S\), got \(5,\)"),
        ((X, Y[:5]), {}, ValueError, r"must agree but for the last dimension, got \(6, 5\) and \(5, 7\)"),
        ((X, Y, [5, 2]), {}, ValueError, "lengths must sum to the number of tokens, got 7 and 6 tokens"),
        ((X, Y, [7, -1]), {}, ValueError, r"lengths\[1\] must be at least 0, got lengths\[1\]=-1"),
        ((X, Y, [3.0, 3.0]), {}, TypeError, r"lengths\[0\] must be an integer"),
        ((X, Y, torch.tensor([[6]])), {}, ValueError, r"lengths must have shape \(B,\)"),
        ((X, Y, [6]), {"mask": torch.ones(6, dtype=torch.bool)}, ValueError, "lengths describe packed tokens"),
        ((X[None], Y[None], [6]), {}, ValueError, "lengths describe packed tokens"),
        ((X, Y), {"mask": torch.ones(6, dtype=torch.bool)}, ValueError, r"mask must have shape \(B, n\), got \(6,\)"),
        ((X[None], Y[None]), {"mask": torch.ones(1, 6)}, TypeError, "mask must be a bool tensor, got torch.float32"),
        ((X, Y), {"image_count": -1}, ValueError, "image_count must be"),
        ((X, Y, 6), {}, TypeError, "lengths must be a sequence of integers or a tensor, got int"),
        ((X[None], Y[None]), {"mask": [[True] * 6]}, TypeError, "mask must be a bool tensor, got list"),
        ((X, Y.to("meta")), {}, ValueError, "must be on one device"),
    ],
)
def test_bad_input_names_argument_rule_and_value(arguments, options, error, message):
    with pytest.raises(error, match=message):
        RelationalCKA()(*arguments, **options)


def test_bad_options_and_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="estimator must be one of 'biased', 'unbiased'"):
        RelationalCKA(estimator="minibatch")
    with pytest.raises(ValueError, match="normalize must be one of True, False, got normalize='no'"):
        RelationalCKA(normalize="no")
    with pytest.raises(ValueError, match="min_tokens must be at least 4, got min_tokens=3"):
        RelationalCKA(estimator="unbiased", min_tokens=3)
    with pytest.raises(ValueError, match=r"x must have at least 4 rows for estimator='unbiased', got \(3, 5\)"):
        cka(X[:3], Y[:3], estimator="unbiased")
    with pytest.raises(ValueError, match="x and y must have the same number of rows"):
        cka(X, Y[:3])
    with pytest.raises(ValueError, match=r"y must have shape \(n, dy\)"):
        cka(X, Y[None])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_a_token_that_is_not_finite_shows_in_the_loss_and_in_its_own_image_alone(value, estimator):
    x, y = normal(1, 12, 5), normal(2, 12, 6)
    poisoned = x.clone()
    poisoned[0, 0] = value
    poisoned.requires_grad_(), x.requires_grad_()
    criterion = RelationalCKA(estimator=estimator)
    loss = criterion(poisoned, y, [6, 6])
    loss.backward()
    criterion(x, y, [6, 6]).backward()
    assert loss.isnan()
    torch.testing.assert_close(poisoned.grad[6:], x.grad[6:])


def test_a_token_that_is_not_finite_leaves_the_loss_with_an_image_that_is_too_small():
    x, y = normal(1, 9, 5), normal(2, 9, 6)
    x[0, 0] = math.nan
    x.requires_grad_()
    for lengths, size in (([3, 6], 9), ([3, 3], 6)):
        loss = RelationalCKA()(x[:size], y[:size], lengths)
        torch.testing.assert_close(loss, 1 - cka(x[3:], y[3:]) if size == 9 else torch.zeros_like(loss))
        (gradient,) = torch.autograd.grad(loss, x)
        assert (gradient[:3] == 0).all()
        assert gradient.isfinite().all()
