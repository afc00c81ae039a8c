"""Laws of pool_tokens over drawn grids: what area-weighted averages keep."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds

from gracekit.vlm import pool_tokens

WIDTH = 3
sizes = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))
# Images of drawn grids, each with a target that is no finer.
images = st.lists(st.tuples(sizes, sizes).map(lambda p: (p[0], tuple(map(min, *p)))), min_size=1, max_size=3)


def split(drawn):
    grids, targets = [grid for grid, _ in drawn], [target for _, target in drawn]
    return grids, targets, [t * h * w for t, h, w in grids]


@given(images, seeds)
def test_the_mean_of_every_image_is_kept(drawn, seed):
    """mean(pool(x)) == mean(x), also where the target's sizes do not divide the grid's."""
    grids, targets, lengths = split(drawn)
    tokens = normal(seed, sum(lengths), WIDTH)
    pooled, got = pool_tokens(tokens, grids, targets)
    for before, after in zip(tokens.split(lengths), pooled.split(got), strict=True):
        torch.testing.assert_close(after.mean(0), before.mean(0))


@given(images, seeds)
def test_a_constant_image_stays_constant(drawn, seed):
    """Weights of a target cell sum to 1."""
    grids, targets, lengths = split(drawn)
    values = normal(seed, len(grids), WIDTH)
    tokens = torch.cat([value.expand(n, WIDTH) for value, n in zip(values, lengths, strict=True)])
    pooled, got = pool_tokens(tokens, grids, targets)
    for value, after in zip(values, pooled.split(got), strict=True):
        torch.testing.assert_close(after, value.expand_as(after))


@given(images, seeds)
def test_equal_grids_are_the_identity(drawn, seed):
    """pool(x, grid -> grid) == x, bit for bit."""
    grids, _, lengths = split(drawn)
    tokens = normal(seed, sum(lengths), WIDTH, dtype=torch.bfloat16)
    pooled, got = pool_tokens(tokens, grids, grids)
    assert torch.equal(pooled, tokens)
    assert got == lengths


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), sizes, seeds)
def test_whole_factors_are_ordinary_average_pooling(t, h, w, target, seed):
    """Where target sizes divide the grid's, pooling equals torch's avg_pool3d."""
    grid = (t * target[0], h * target[1], w * target[2])
    tokens = normal(seed, grid[0] * grid[1] * grid[2], WIDTH)
    pooled, _ = pool_tokens(tokens, [grid], [target])
    cube = tokens.T.reshape(1, WIDTH, *grid)
    torch.testing.assert_close(pooled, torch.nn.functional.avg_pool3d(cube, (t, h, w)).flatten(2)[0].T)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), seeds)
def test_a_cell_weighs_what_of_it_lies_in_the_target(rows, columns, wanted, seed):
    """Whatever the factor: target i covers [i, i + 1] * rows / wanted, and a cut cell counts with its part."""
    wanted = min(rows, wanted)
    tokens = normal(seed, rows * columns, WIDTH)
    pooled, _ = pool_tokens(tokens, [(rows, columns)], [(wanted, 1)])
    means = tokens.reshape(rows, columns, WIDTH).mean(1)
    for i in range(wanted):
        low, high = i * rows / wanted, (i + 1) * rows / wanted
        parts = [max(0.0, min(j + 1, high) - max(j, low)) for j in range(rows)]
        expected = sum(part * mean for part, mean in zip(parts, means, strict=True)) / sum(parts)
        torch.testing.assert_close(pooled[i], expected)


@given(images, seeds, st.randoms(use_true_random=False))
def test_permuting_images_permutes_what_is_pooled(drawn, seed, random):
    """Images do not see each other."""
    order = random.sample(range(len(drawn)), len(drawn))
    grids, targets, lengths = split(drawn)
    images_of = normal(seed, sum(lengths), WIDTH).split(lengths)
    straight, got = pool_tokens(torch.cat(images_of), grids, targets)
    permuted, permuted_lengths = pool_tokens(
        torch.cat([images_of[i] for i in order]), [grids[i] for i in order], [targets[i] for i in order]
    )
    assert permuted_lengths == [got[i] for i in order]
    assert torch.equal(permuted, torch.cat([straight.split(got)[i] for i in order]))
