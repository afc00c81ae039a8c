"""Laws of centred kernel alignment, whatever the tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, normal, scales, seeds

from gracekit import RelationalCKA, cka

counts = st.integers(4, 30)
widths = st.integers(1, 20)
estimators = st.sampled_from(["biased", "unbiased"])


def rotation(seed, width):
    return torch.linalg.qr(normal(seed, width, width)).Q


@given(seeds, counts, widths, widths, scales)
def test_biased_similarity_lies_between_zero_and_one(seed, n, dx, dy, scale):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        value = cka(normal(seed, n, dx, dtype=dtype, scale=scale), normal(seed + 1, n, dy, dtype=dtype))
        assert 0.0 <= value.item() <= 1.0


@given(seeds, counts, st.integers(2, 20))
def test_similarity_of_equal_tokens_is_one(seed, n, d):
    x = normal(seed, n, d)
    assert cka(x, x).item() == pytest.approx(1.0, abs=1e-9)


@given(seeds, counts, widths, widths, estimators)
def test_rotating_features_changes_nothing_on_either_side(seed, n, dx, dy, estimator):
    x, y = normal(seed, n, dx), normal(seed + 1, n, dy)
    expected = cka(x, y, estimator=estimator)
    rotated = cka(x @ rotation(seed + 2, dx), y @ rotation(seed + 3, dy), estimator=estimator)
    torch.testing.assert_close(rotated, expected, rtol=1e-6, atol=1e-7)


@given(seeds, counts, widths, widths, estimators)
def test_scaling_tokens_changes_nothing_on_either_side(seed, n, dx, dy, estimator):
    x, y = normal(seed, n, dx), normal(seed + 1, n, dy)
    factors = normal(seed + 2, n, 2).abs() + 0.01
    scaled = cka(x * factors[:, :1], y * factors[:, 1:], estimator=estimator)
    torch.testing.assert_close(scaled, cka(x, y, estimator=estimator), rtol=1e-6, atol=1e-7)


@given(seeds, counts, widths, widths, estimators)
def test_similarity_is_symmetric(seed, n, dx, dy, estimator):
    x, y = normal(seed, n, dx), normal(seed + 1, n, dy)
    torch.testing.assert_close(cka(x, y, estimator=estimator), cka(y, x, estimator=estimator), rtol=1e-9, atol=1e-12)


@given(seeds, counts, widths, widths, estimators)
def test_permuting_tokens_alike_on_both_sides_changes_nothing(seed, n, dx, dy, estimator):
    x, y = normal(seed, n, dx), normal(seed + 1, n, dy)
    order = torch.randperm(n, generator=generator(seed))
    permuted = cka(x[order], y[order], estimator=estimator)
    torch.testing.assert_close(permuted, cka(x, y, estimator=estimator), rtol=1e-7, atol=1e-9)


@given(seeds, st.lists(st.integers(0, 12), min_size=1, max_size=6), widths, widths, estimators)
def test_packed_padded_and_single_images_agree(seed, lengths, dx, dy, estimator):
    total = sum(lengths)
    x, y = normal(seed, total, dx).requires_grad_(), normal(seed + 1, total, dy)
    criterion = RelationalCKA(estimator=estimator)
    packed = criterion(x, y, lengths=lengths)
    longest = max(max(lengths), 1)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    padded_x = torch.full((len(lengths), longest, dx), torch.nan, dtype=x.dtype)
    padded_y = torch.full((len(lengths), longest, dy), torch.nan, dtype=x.dtype)
    padded_x = padded_x.masked_scatter(mask[..., None], x)
    padded_y[mask] = y
    padded = criterion(padded_x, padded_y, mask=mask)
    singles = [
        (1.0 - similarity, similarity)
        for a, b in zip(x.split(lengths), y.split(lengths), strict=True)
        if len(a) >= 4
        for similarity in [cka(a, b, estimator=estimator)]
        if similarity.requires_grad and similarity.item() != 0.0
    ]
    expected = torch.stack([loss for loss, _ in singles]).mean() if singles else packed.new_zeros(())
    torch.testing.assert_close(packed.detach(), expected.detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(padded.detach(), expected.detach(), rtol=1e-7, atol=1e-9)
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (packed, padded)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)
    assert gradients[0].isfinite().all()


@given(seeds, st.lists(st.integers(0, 12), min_size=1, max_size=6), st.data())
def test_image_parts_with_the_global_count_add_up_to_the_whole(seed, lengths, data):
    cut = data.draw(st.integers(0, len(lengths)))
    x, y = normal(seed, sum(lengths), 5), normal(seed + 1, sum(lengths), 7)
    criterion = RelationalCKA()
    counted = sum(length >= 4 for length in lengths)
    edge = sum(lengths[:cut])
    parts = [
        criterion(x[:edge], y[:edge], lengths[:cut], image_count=counted),
        criterion(x[edge:], y[edge:], lengths[cut:], image_count=torch.tensor(counted)),
    ]
    torch.testing.assert_close(sum(parts), criterion(x, y, lengths), rtol=1e-9, atol=1e-12)
