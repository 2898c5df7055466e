import dataclasses
from pathlib import Path
from typing import Literal, get_origin

import pytest
import yaml

from xrai import config as configuration
from xrai.config import Config, Flag, all_keys, from_mapping, parse
from xrai.errors import ConfigError

REPOSITORY = Path(__file__).parents[1]
KEYS_FILE = Path(__file__).with_name("config_keys.txt")


def read(*arguments: str) -> Config:
    return parse("train", arguments, description="d")[0]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_every_key_is_in_the_checked_in_list():
    keys = [f"{spec.name} = {spec.default!r}" for spec in all_keys()]
    assert KEYS_FILE.read_text().splitlines() == keys, (
        f"write the new list to {KEYS_FILE.name} if you meant the change"
    )


def test_every_default_is_allowed_and_survives_the_way_through_yaml():
    config = read()
    assert config == Config()
    assert from_mapping(yaml.safe_load(config.to_yaml()), where="here") == config


def test_the_command_line_wins_over_the_file_wherever_it_stands(tmp_path: Path):
    file = write(tmp_path / "c.yaml", "train: {epochs: 3, seed: 5}\noptim: {lr: 1e-3}\n")
    for arguments in (
        ["--config", file, "--train.epochs=7"],
        ["--train.epochs", "7", f"--config={file}"],
    ):
        config = read(*arguments)
        assert (config.train.epochs, config.train.seed, config.optim.lr) == (7, 5, 0.001)


def test_a_later_file_wins_over_an_earlier_one(tmp_path: Path):
    first, second = (
        write(tmp_path / "a.yaml", "train: {epochs: 3, seed: 1}"),
        write(tmp_path / "b.yaml", "train: {epochs: 4}"),
    )
    config = read("--config", first, "--config", second)
    assert (config.train.epochs, config.train.seed) == (4, 1)


def test_yaml_off_and_numbers_as_text_are_understood(tmp_path: Path):
    config = read(
        "--config", write(tmp_path / "c.yaml", "train: {precision: off}\noptim: {lr: 3e-3}")
    )
    assert config.train.precision == "off" and config.optim.lr == 0.003


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--optim.lrr=3",
            "unknown option --optim.lrr (value '3') of xrai.train; did you mean --optim.lr?",
        ),
        ("--epochs=3", "did you mean --train.epochs?"),
        ("--zzz", "unknown option --zzz of xrai.train; --help lists all that are allowed"),
        (
            "--train.epochs=x",
            "train.epochs = 'x' is not allowed: it takes a whole number at least 1",
        ),
        ("--train.epochs=0", "train.epochs = 0 is not allowed"),
        ("--train.epochs=1.5", "train.epochs = 1.5 is not allowed"),
        ("--train.epochs=true", "train.epochs = True is not allowed"),
        ("--train.precision=half", "it takes one of auto, bf16, fp16, off, fp64"),
        ("--optim.lr=nan", "optim.lr = 'nan' is not allowed"),
        ("--optim.lr=.inf", "optim.lr = inf is not allowed"),
        ("--images.fit=stretch", "it takes one of crop, squash, pad"),
        ("--optim.lr", "expected one argument"),
        ("--train.compile=3", "it takes true or false"),
        ("surplus", "surplus"),
    ],
)
def test_a_wrong_option_is_refused_with_key_value_and_what_is_allowed(argument: str, message: str):
    with pytest.raises(ConfigError) as caught:
        read(argument)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {epochs: 3}", "unknown section 'trian' in {file}; did you mean train?"),
        (
            "train: {epoch: 3}",
            "unknown key 'train.epoch' (value 3) in {file}; did you mean train.epochs?",
        ),
        ("train: 3", "section 'train' in {file} must hold keys, not 3"),
        ("[1]", "in {file}: a config holds sections of keys, not list"),
        ("train: {epochs: many}", "train.epochs = 'many' in {file} is not allowed"),
        ("train: {epochs: '3'}", "train.epochs = '3' in {file} is not allowed"),
        ("a: b: c", "config file {file} is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_naming_file_key_and_value(tmp_path: Path, text: str, message: str):
    file = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as caught:
        read("--config", file)
    assert message.format(file=file) in str(caught.value)


def test_a_missing_file_is_refused():
    with pytest.raises(ConfigError, match=r"there is no config file /nowhere/c\.yaml"):
        read("--config=/nowhere/c.yaml")


def test_splits_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        read("--splits.val_fraction=0.5", "--splits.test_fraction=0.5")


def test_flags_take_their_default_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    flags = [
        Flag("dataset", "data/dataset", "address", "XRAI_DATASET"),
        Flag("check", False, "dry run", type=bool),
    ]
    assert parse("train", [], description="d", flags=flags)[1] == {
        "dataset": "data/dataset",
        "check": False,
    }
    monkeypatch.setenv("XRAI_DATASET", "s3://bucket/set")
    assert parse("train", ["--check"], description="d", flags=flags)[1] == {
        "dataset": "s3://bucket/set",
        "check": True,
    }
    assert parse("train", ["--dataset=here"], description="d", flags=flags)[1]["dataset"] == "here"
    monkeypatch.setenv("XRAI_DATASET", "")
    assert parse("train", [], description="d", flags=flags)[1]["dataset"] == "data/dataset"


def test_help_lists_every_key_with_its_default_and_meaning(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        parse(
            "train",
            ["--help"],
            description="d",
            flags=[Flag("dataset", "x", "address", "XRAI_DATASET")],
        )
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for spec in all_keys():
        assert f"--{spec.name}" in text
        assert " ".join(spec.meaning.split()) in text
        if spec.default != "":
            assert f"default: {spec.default}" in text, spec.name
    assert "environment: XRAI_DATASET" in text


def test_print_config_prints_what_a_config_file_can_hold(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        read("--train.epochs=9", "--print_config")
    assert caught.value.code == 0
    assert from_mapping(yaml.safe_load(capsys.readouterr().out), where="there").train.epochs == 9


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_config_file_can_be_read_and_has_a_header(path: Path):
    read("--config", str(path))
    header = path.read_text().partition("\n\n")[0]
    assert header.startswith("#")
    assert all(word in path.read_text() for word in ("Hardware:", "Expected:"))


def test_the_reference_recipe_is_the_defaults():
    assert read("--config", str(REPOSITORY / "configs/pneumonia.yaml")) == Config()


def test_every_key_has_a_meaning_and_numbers_have_bounds():
    for spec in all_keys():
        assert len(spec.meaning) > 5
        if get_origin(spec.type) is not Literal and spec.type in (int, float):
            assert spec.bounds != configuration._Bounds(), f"{spec.name} would take any number"
    assert {field.name for field in dataclasses.fields(Config)} == {
        spec.name.partition(".")[0] for spec in all_keys()
    }
