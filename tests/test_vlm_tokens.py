"""visual_tokens on hand-made tensors: which rows are gathered, in which order, and what is refused."""

import pytest
import torch

from gracekit.vlm import visual_tokens
from gracekit.vlm.tokens import feature_lengths

IMAGE = 9
IDS = torch.tensor([[1, 9, 9, 2, 9, 3], [-1, -1, 4, 9, 9, 9]])


def hidden_like(ids, width=2):
    """Row (b, s) holds 10 b + s, so that a gathered row says where it came from."""
    places = 10.0 * torch.arange(ids.shape[0])[:, None] + torch.arange(ids.shape[1])
    return places[..., None].repeat(1, 1, width).requires_grad_()


def test_runs_of_placeholders_are_images_in_row_major_order():
    tokens, lengths = visual_tokens(hidden_like(IDS), IDS, IMAGE)
    assert tokens[:, 0].tolist() == [1, 2, 4, 13, 14, 15]
    assert lengths == [2, 1, 3]


def test_given_lengths_part_adjacent_images():
    tokens, lengths = visual_tokens(hidden_like(IDS), IDS, IMAGE, lengths=[1, 1, 1, 2, 1])
    assert tokens[:, 0].tolist() == [1, 2, 4, 13, 14, 15]
    assert lengths == [1, 1, 1, 2, 1]


def test_gradients_are_one_at_gathered_rows_and_zero_elsewhere():
    hidden = hidden_like(IDS)
    visual_tokens(hidden, IDS, IMAGE)[0].sum().backward()
    assert torch.equal(hidden.grad[..., 0], (IDS == IMAGE).float())


def test_no_placeholder_gives_no_rows_that_are_still_attached_to_the_graph():
    hidden, ids = hidden_like(IDS), torch.ones_like(IDS)
    for given in (None, []):
        tokens, lengths = visual_tokens(hidden, ids, IMAGE, lengths=given)
        assert tokens.shape == (0, 2)
        assert lengths == []
        tokens.sum().backward()
        assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_with_lengths_no_value_is_read_on_the_host():
    """Meta tensors have no values: whatever needs one raises."""
    hidden, ids = torch.empty(2, 6, 4, device="meta"), torch.empty(2, 6, dtype=torch.long, device="meta")
    tokens, lengths = visual_tokens(hidden, ids, IMAGE, lengths=[2, 4])
    assert tokens.shape == (6, 4)
    assert lengths == [2, 4]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([2, 1], r"2 lengths with sum 3 for 6 placeholders, \[3, 3\] by sample"),
        ([2, 1, 3, 1], "4 lengths with sum 7 for 6 placeholders"),
        ([2, 4], "no image may cross from one sample to the next"),
        ([], "0 lengths with sum 0 for 6 placeholders"),
        ([3, 0, 3], r"lengths\[1\] must be at least 1, got lengths\[1\]=0"),
    ],
)
def test_lengths_that_do_not_fit_the_placeholders_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        visual_tokens(hidden_like(IDS), IDS, IMAGE, lengths=lengths)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(2, 6, 2, dtype=torch.long)}, TypeError, "hidden must have a floating dtype"),
        ({"hidden": torch.ones(6, 2)}, ValueError, r"hidden must have shape \(B, S, d\), got \(6, 2\)"),
        ({"input_ids": IDS.float()}, TypeError, "input_ids must have an integer dtype"),
        ({"input_ids": IDS[:, :5]}, ValueError, r"got input_ids of shape \(2, 5\) and hidden of shape \(2, 6, 2\)"),
        ({"input_ids": IDS.to("meta")}, ValueError, "hidden and input_ids must be on one device"),
        ({"image_token_id": -1}, ValueError, "image_token_id must be at least 0, got image_token_id=-1"),
        ({"image_token_id": None}, TypeError, "image_token_id must be an integer"),
        ({"lengths": [1.5, 4.5]}, TypeError, r"lengths\[0\] must be an integer"),
        ({"lengths": 6}, TypeError, "lengths must be a sequence of integers, got int"),
    ],
)
def test_bad_arguments_are_named_with_rule_and_value(change, error, message):
    arguments = {"hidden": hidden_like(IDS), "input_ids": IDS, "image_token_id": IMAGE} | change
    with pytest.raises(error, match=message):
        visual_tokens(**arguments)


def test_feature_lengths_follow_how_each_family_lists_its_features():
    d = 3
    assert feature_lengths([torch.zeros(4, d), torch.zeros(6, d)]) == [4, 6]
    assert feature_lengths((torch.zeros(2, 4, d), torch.zeros(5, d))) == [8, 5]
    assert feature_lengths(torch.zeros(2, 7, d)) == [7, 7]
    assert feature_lengths([torch.zeros(4, d), torch.zeros(0, d)]) == [4]
    assert feature_lengths(torch.zeros(11, d)) is None
    assert feature_lengths("no tensor") is None
