"""Laws of visual_tokens over drawn layouts: samples of text and images of drawn sizes."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds

from gracekit.vlm import visual_tokens

IMAGE, PAD, WIDTH = 9, 0, 3
# A sample is a list of segments: 0 is a text token, n > 0 an image of n tokens.
samples = st.lists(st.lists(st.sampled_from([0, 0, 1, 2, 5]), max_size=6), min_size=1, max_size=4)


def laid_out(rows, hiddens, *, side, extra):
    """Pad rows of ids and their hidden states to one length, plus ``extra``; padding carries values of its own."""
    longest = max(map(len, rows)) + extra
    ids = torch.full((len(rows), longest), PAD)
    hidden = torch.full((len(rows), longest, WIDTH), -7.0, dtype=torch.float64)
    for i, (row, values) in enumerate(zip(rows, hiddens, strict=True)):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[i, place], hidden[i, place] = torch.tensor(row, dtype=torch.long), values
    return hidden, ids


def rows_of(layout):
    return [[token for n in sample for token in ([IMAGE] * n or [1])] for sample in layout]


def drawn(layout, seed):
    rows = rows_of(layout)
    return rows, [normal(seed + i, len(row), WIDTH) for i, row in enumerate(rows)], [n for s in layout for n in s if n]


@given(samples, seeds, st.integers(1, 3))
def test_the_side_and_amount_of_padding_change_nothing(layout, seed, extra):
    """visual_tokens(left padded) == visual_tokens(right padded by any amount more)."""
    rows, hiddens, lengths = drawn(layout, seed)
    left = visual_tokens(*laid_out(rows, hiddens, side="left", extra=0), IMAGE, lengths=lengths)
    right = visual_tokens(*laid_out(rows, hiddens, side="right", extra=extra), IMAGE, lengths=lengths)
    assert torch.equal(left[0], right[0])
    assert left[1] == right[1] == lengths


@given(samples, seeds)
def test_lengths_sum_to_the_token_count_and_every_placeholder_is_gathered_once(layout, seed):
    """sum(lengths) == len(tokens) == number of placeholders, with given lengths and with runs."""
    rows, hiddens, lengths = drawn(layout, seed)
    hidden, ids = laid_out(rows, hiddens, side="left", extra=0)
    for given_lengths in (lengths, None):
        tokens, found = visual_tokens(hidden, ids, IMAGE, lengths=given_lengths)
        assert sum(found) == len(tokens) == int((ids == IMAGE).sum())
        assert torch.equal(tokens, hidden[ids == IMAGE])


@given(samples, seeds, st.randoms(use_true_random=False))
def test_permuting_samples_permutes_images(layout, seed, random):
    """The images of a permuted batch are the images of each sample, in the permuted order."""
    rows, hiddens, _ = drawn(layout, seed)
    order = random.sample(range(len(layout)), len(layout))

    def images(which):
        lengths = [n for i in which for n in layout[i] if n]
        arguments = laid_out([rows[i] for i in which], [hiddens[i] for i in which], side="left", extra=0)
        tokens, found = visual_tokens(*arguments, IMAGE, lengths=lengths)
        return tokens.split(found)

    alone = [images([i]) for i in range(len(layout))]
    together = images(order)
    expected = [image for i in order for image in alone[i]]
    assert len(together) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(together, expected, strict=True))


@given(samples, seeds)
def test_runs_agree_with_the_true_lengths_where_text_parts_the_images(layout, seed):
    """With a text token between any two images, runs of placeholders are the images."""
    parted = [[m for n in sample for m in (n, 0)] for sample in layout]
    rows, hiddens, lengths = drawn(parted, seed)
    _, found = visual_tokens(*laid_out(rows, hiddens, side="right", extra=0), IMAGE)
    assert found == lengths
