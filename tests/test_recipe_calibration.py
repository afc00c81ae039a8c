"""`--tau auto`: which value it finds, what it makes of values that are not finite, and that an interruption changes nothing."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from gracekit.recipe.calibration import TauCalibration
from gracekit.recipe.config import GraceConfig, RecipeConfig, TrainConfig


def found(values, **options):
    calibration = TauCalibration(len(values), **options)
    calibration.begin(len(values) + 1)
    targets = [calibration.add(torch.tensor(float(value))) for value in values]
    assert targets[:-1] == [None] * (len(values) - 1)
    return targets[-1]


def test_tau_is_the_quantile_of_the_first_steps():
    assert found([11 - i for i in range(11)]) == pytest.approx(2.0)  # ten intervals, so the quantiles are the values
    assert found([5, 1, 3], quantile=0.5) == 3.0
    assert found([5, 1, 3], quantile=0.0) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_is_left_out(bad):
    assert found([5, 1, bad, 3], quantile=0.5) == 3.0


def test_too_few_finite_steps_are_refused_with_their_number():
    assert found([4, math.nan], quantile=0.5) == 4.0
    with pytest.raises(ValueError, match=r"at least half of its tau_steps=3 steps, got 1"):
        found([math.nan, 4, math.inf])


def test_without_a_number_it_looks_at_most_of_the_training():
    for steps, expected in ((1000, 700), (10, 7), (3, 2)):
        calibration = TauCalibration()
        calibration.begin(steps)
        assert calibration.steps == expected


@pytest.mark.parametrize(("steps", "training"), [(8, 8), (9, 8), (0, 2)])
def test_a_calibration_as_long_as_the_training_is_refused(steps, training):
    with pytest.raises(ValueError, match=rf"tau_steps must be below the training's {training} steps .*got tau_steps="):
        TauCalibration(steps).begin(training)
    with pytest.raises(ValueError, match="tau_steps must be below"):
        RecipeConfig(train=TrainConfig(steps=training), grace=GraceConfig(tau="auto", tau_steps=steps))
    RecipeConfig(train=TrainConfig(steps=training), grace=GraceConfig(tau="1.0", tau_steps=steps))


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_a_calibration_goes_on_from_a_file_as_if_never_interrupted(tmp_path, cut):
    values = [3.0, math.nan, 1.5, 0.1, 2.0]
    whole, first, second = (TauCalibration(len(values), 0.3) for _ in range(3))
    for value in values:
        whole.add(torch.tensor(value))
    for value in values[:cut]:
        first.add(torch.tensor(value))
    save_file(first.state(), tmp_path / "state")
    second.load(load_file(tmp_path / "state"))
    for value in values[cut:]:
        second.add(torch.tensor(value))
    assert second.target == whole.target
    assert second.state().keys() == whole.state().keys()
    for name, value in whole.state().items():
        torch.testing.assert_close(second.state()[name], value, rtol=0, atol=0, equal_nan=True)
