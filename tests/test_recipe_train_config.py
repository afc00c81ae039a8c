"""Settings of `gracekit train`: presets, a file and flags, the later over the earlier; bad ones are refused by name."""

import json

import pytest
import transformers
import yaml

from gracekit.recipe.train_config import PRESETS, parse, preset

NEEDED = ["--student", "s", "--teacher", "t", "--data", "d.json", "--use_cpu", "true"]


def test_presets_are_the_published_settings():
    paper = parse([*NEEDED, "--preset", "paper"])
    assert (paper.method.tau, paper.method.eta, paper.method.omega) == ("0.35", 0.0015, 1.0)
    assert (paper.method.beta_initial, paper.method.beta_min, paper.method.beta_max) == (1.0, 0.1, 5.0)
    assert (paper.training.learning_rate, paper.training.weight_decay, paper.training.warmup_steps) == (
        1e-5,
        1e-3,
        0.03,
    )
    assert (paper.training.num_train_epochs, paper.training.max_grad_norm) == (3, 1.0)
    released = parse([*NEEDED, "--preset", "released"])
    assert (released.method.tau, released.method.eta, released.method.omega) == ("3.0", 0.003, 3.0)
    assert (released.method.beta_initial, released.method.beta_max, released.method.relational_warmup) == (
        0.5,
        1.0,
        400,
    )


def test_the_small_preset_is_the_built_in_run():
    from gracekit.recipe.config import GraceConfig, TrainConfig

    small, grace, train = parse([*NEEDED, "--preset", "small"]), GraceConfig(), TrainConfig()
    for name in (
        "eta",
        "beta_initial",
        "beta_min",
        "beta_max",
        "ema_decay",
        "omega",
        "temperature",
        "alpha",
        "beta_dkd",
    ):
        assert getattr(small.method, name) == getattr(grace, name), name
    assert float(small.method.tau) == float(grace.tau)
    assert small.training.learning_rate == train.learning_rate
    assert small.training.max_steps == train.steps + train.finish
    assert small.training.per_device_train_batch_size == train.batch_size
    assert small.pair.group_size == train.group_size


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_of_a_preset_is_an_option(name):
    config = parse([*NEEDED, "--preset", name]).as_dict()
    known = {key for part in config.values() for key in part}
    assert set(preset(name)) <= known


def test_a_file_goes_over_its_preset_and_flags_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "student": "s",
                "teacher": "t",
                "data": "d",
                "use_cpu": True,
                "preset": "released",
                "omega": 2.0,
                "eta": 0.01,
            }
        )
    )
    config = parse([str(path), "--eta", "0.02", "--learning_rate", "2e-5"])
    assert (config.method.omega, config.method.eta, config.method.tau) == (2.0, 0.02, "3.0")
    assert config.training.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus", "1"], "every option must be one of gracekit train, spelt out, got --bogus 1"),
        (["--omeg", "3"], "got --omeg 3"),
        (["--learning_rate", "nan"], r"learning_rate must be finite and in \[0, inf\], got learning_rate=nan"),
        (["--adam_beta2", "1"], "adam_beta2 must be below 1"),
        (["--num_train_epochs", "0"], r"num_train_epochs must be finite and in \(0, inf\]"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1"),
        (["--gradient_accumulation_steps", "-1"], "gradient_accumulation_steps must be at least 1"),
        (["--preset"], "preset must be one of"),
        (["--preset=best"], "preset must be one of"),
        (["--resume_from_checkpoint", "x"], "resume_from_checkpoint must be left at None .* goes on by itself"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor must be left at 0.0"),
        (["--eval_strategy", "steps"], "eval_strategy must be left at 'no' .*see gracekit evaluate"),
        (["--remove_unused_columns", "true"], "remove_unused_columns must be left at False"),
        (["--report_to", "telegraph"], "report_to must name what is installed, got .*telegraph"),
        (["--tau", "auto", "--tau_steps", "9", "--max_steps", "9"], "tau_steps must be below the training's 9 steps"),
        (["--preset", "best"], "preset must be one of"),
        (["--losses", "mse"], "losses must be one of"),
        (["--temperature", "1e30"], "temperature must be finite and in .0.0001, 1000., got temperature=1e.30"),
        (["--tau", "small"], "tau must be a number or 'auto', got tau='small'"),
        (["--max_length", "1"], "max_length must be at least 2, got max_length=1"),
        (["--teacher", ""], "teacher must name a model for losses='grace'"),
        (["--student", ""], "student must name a model"),
        (["--streaming", "true"], "max_steps must be given with streaming, which has no end, got max_steps=-1"),
        (
            ["--streaming", "true", "--max_steps", "9", "--teacher_mode", "precomputed"],
            "teacher_mode must be 'online' or 'offload' with streaming",
        ),
        (
            ["--streaming", "true", "--max_steps", "9", "--train_sampling_strategy", "group_by_length"],
            "train_sampling_strategy must be left out with streaming",
        ),
        (["--relational_warmup", "-1"], "relational_warmup must be at least 0"),
    ],
)
def test_bad_settings_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse([*NEEDED, *arguments])


def test_a_log_that_cannot_be_written_is_refused_before_any_work(monkeypatch):
    def missing():
        raise RuntimeError("WandbCallback requires wandb to be installed")

    monkeypatch.setitem(transformers.integrations.INTEGRATION_TO_CALLBACK, "wandb", missing)
    with pytest.raises(ValueError, match=r"report_to must name what is installed, got .*'wandb'.*requires wandb"):
        parse([*NEEDED, "--report_to", "wandb"])


def test_a_preset_is_named_in_either_spelling():
    assert parse([*NEEDED, "--preset=released"]).method == parse([*NEEDED, "--preset", "released"]).method


@pytest.mark.parametrize("spelt", [["--num_train_epochs", "2"], ["--num-train-epochs=2"]])
def test_epochs_that_are_asked_for_are_not_overruled_by_the_steps_of_a_preset(tmp_path, spelt):
    small = [*NEEDED, "--preset", "small"]
    asked = parse([*small, *spelt]).training
    assert (asked.num_train_epochs, asked.max_steps) == (2, -1)
    (tmp_path / "run.yaml").write_text("num_train_epochs: 2\n")
    assert parse([str(tmp_path / "run.yaml"), *small]).training.max_steps == -1
    assert parse([*small, *spelt, "--max_steps", "9"]).training.max_steps == 9


@pytest.mark.parametrize(("arguments", "expected"), [([], "paper"), (["--preset", "small"], "small")])
def test_the_help_states_the_defaults_that_are_in_force(capsys, arguments, expected):
    with pytest.raises(SystemExit):
        parse([*arguments, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    config = parse([*NEEDED, *arguments])
    for option, value in (
        ("--omega OMEGA", config.method.omega),
        ("--ema_decay EMA_DECAY", config.method.ema_decay),
        ("--learning_rate LEARNING_RATE", config.training.learning_rate),
    ):
        text = shown.split(f" {option}")[-1]
        assert text[text.index("(default: ") :].startswith(f"(default: {value})"), option
    assert f"Defaults are those of --preset {expected}." in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("omeg: 3\n", "every key must be an option of gracekit train, got 'omeg' in"),
        ("3: 4\n", "every key must be an option of gracekit train, got 3 in"),
        ("omega: null\n", "omega must have a value, or be left out, got null in"),
        ("preset: null\n", "preset must be one of"),
        ("omega: [3\n b: c", "the settings file must be YAML, got .*run.yaml"),
        ("omega: \x00", "the settings file must be YAML, got .*run.yaml"),
    ],
)
def test_a_file_that_would_not_be_followed_is_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        parse([str(path), *NEEDED])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("false", False)])
def test_sharding_is_a_switch_in_a_file_as_well(tmp_path, value, expected):
    (tmp_path / "run.yaml").write_text(f"fsdp: {value}\n")
    assert bool(parse([str(tmp_path / "run.yaml"), *NEEDED]).training.fsdp) == expected


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="must be a mapping of option to value, got list"):
        parse([str(tmp_path / "list.yaml")])


def test_only_settings_that_change_the_result_make_another_run():
    first = json.loads(json.dumps(parse(NEEDED).as_dict()))
    assert parse([*NEEDED, "--logging_steps", "3", "--dataloader_num_workers", "2"]).differences(first) == []
    differences = parse([*NEEDED, "--omega", "4", "--seed", "1"]).differences(first)
    assert differences == ["omega: 1.0 -> 4.0", "seed: 42 -> 1"]


def test_the_workers_of_a_stream_are_part_of_its_order_and_bad_records_are_not():
    options = [*NEEDED, "--streaming", "true", "--max_steps", "9"]
    first = json.loads(json.dumps(parse(options).as_dict()))
    assert parse([*options, "--logging_steps", "3", "--on_bad_record", "skip"]).differences(first) == []
    assert parse([*options, "--dataloader_num_workers", "2"]).differences(first) == ["dataloader_num_workers: 0 -> 2"]
