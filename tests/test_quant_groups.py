import pytest
import torch
from quant_cases import SMALL, Pair, prepared, weights

from gracekit.quant import prepare_qat, qat_parameter_groups


def test_groups_give_scales_ten_times_the_rate_and_no_decay():
    model = Pair()
    prepare_qat(model, SMALL)
    matrices, vectors, scales = qat_parameter_groups(model, lr=1e-5, weight_decay=0.1)
    assert (matrices["lr"], matrices["weight_decay"]) == (1e-5, 0.1)
    assert (vectors["lr"], vectors["weight_decay"]) == (1e-5, 0.0)
    assert (scales["lr"], scales["weight_decay"]) == (pytest.approx(1e-4), 0.0)
    assert [id(p) for p in scales["params"]] == [id(p) for n, p in model.named_parameters() if n.endswith("log_scale")]
    together = [id(p) for group in (matrices, vectors, scales) for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in model.parameters())
    assert qat_parameter_groups(model, lr=1e-5, scale_lr=3e-4)[-1]["lr"] == 3e-4
    torch.optim.AdamW([matrices, vectors, scales])


def test_groups_leave_frozen_parameters_out():
    model = prepared(weights("normal", 0, 8, 32, torch.float32, 16), group_size=16)
    model["layer"].weight.requires_grad_(False)
    model["layer"].bias.requires_grad_(False)
    (scales,) = qat_parameter_groups(model, lr=1.0)
    assert [p.shape for p in scales["params"]] == [(8, 2)]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"lr": 1.0, "scale_lr": -1.0}, "scale_lr"),
        ({"lr": 1.0, "weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_groups_refuse_negative_numbers(arguments, match):
    model = Pair()
    prepare_qat(model, SMALL)
    with pytest.raises(ValueError, match=match):
        qat_parameter_groups(model, **arguments)


def test_groups_refuse_a_model_without_scales_or_without_anything_to_train():
    with pytest.raises(ValueError, match="learned scales"):
        qat_parameter_groups(Pair(), lr=1.0)
    model = Pair()
    prepare_qat(model, SMALL)
    with pytest.raises(ValueError, match="requires a gradient"):
        qat_parameter_groups(model.requires_grad_(False), lr=1.0)
