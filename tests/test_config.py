import dataclasses
import os
from pathlib import Path
from typing import Literal, get_origin

import pytest
import yaml

from xrai.command import parse
from xrai.config import Config, all_keys, from_mapping, read_file
from xrai.errors import ConfigError

REPOSITORY = Path(__file__).parents[1]
KEYS_FILE = Path(__file__).with_name("config_keys.txt")


def read(*arguments: str) -> Config:
    return parse("train", arguments, description="d").config


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_every_key_is_in_the_checked_in_list() -> None:
    keys = [f"{spec.name} = {spec.default!r}" for spec in all_keys()]
    assert KEYS_FILE.read_text().splitlines() == keys, (
        f"write the new list to {KEYS_FILE.name} if you meant the change"
    )


def test_every_default_is_allowed_and_survives_the_way_through_yaml() -> None:
    config = read()
    assert config == Config()
    assert from_mapping(yaml.safe_load(config.to_yaml()), where="here") == config


def test_yaml_off_and_numbers_as_text_are_understood(tmp_path: Path) -> None:
    config = read(
        "--config", write(tmp_path / "c.yaml", "train: {precision: off}\noptim: {lr: 3e-3}")
    )
    assert config.train.precision == "off" and config.optim.lr == 0.003


def test_numbers_are_decimal_and_nothing_else_is_a_number(tmp_path: Path) -> None:
    text = (
        "train: {epochs: 1_000, seed: 0, profile: 5:20, max_minutes: 010}\n"
        "optim: {lr: 1.5e-3, weight_decay: .5}\nlabels: {names: 010}"
    )
    config = read("--config", write(tmp_path / "c.yaml", text))
    train, optim = config.train, config.optim
    assert (train.epochs, train.seed, train.max_minutes) == (1000, 0, 10.0)
    assert (train.profile, config.labels.names) == ("5:20", "010")
    assert (optim.lr, optim.weight_decay) == (0.0015, 0.5)
    assert read("--config", write(tmp_path / "d.yaml", config.to_yaml())) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", "010"), ("epochs", "0x10"), ("epochs", "1:30"), ("max_minutes", "1:30.5")],
)
def test_octal_hexadecimal_and_base_60_are_refused(key: str, value: str, tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", f"train: {{{key}: {value}}}")
    for given in (f"--train.{key}={value}", f"--config={file}"):
        with pytest.raises(ConfigError, match=f"train.{key} = '{value}'.* is not allowed"):
            read(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {epochs: 3}", "unknown section 'trian' in {file}; did you mean train?"),
        (
            "train: {epoch: 3}",
            "unknown key 'train.epoch' (value 3) in {file}; did you mean train.epochs?",
        ),
        ("train: 3", "section 'train' in {file} must hold keys, not 3"),
        ("labels: {layout: nhi}", "it takes one of empty, nih, chexpert, rsna, vindr, covidx"),
        ("[1]", "in {file}: a config holds sections of keys, not list"),
        ("train: {epochs: many}", "train.epochs = 'many' in {file} is not allowed"),
        ("train: {epochs: '3'}", "train.epochs = '3' in {file} is not allowed"),
        ("a: b: c", "config file {file} is not valid YAML"),
        ("train:\n  seed: 1\n  epochs: 3\n  seed: 1", "'seed' in line 4 is already in line 2"),
        ("train: {seed: 1, seed: 2}", "'seed' in line 1 is already in line 1"),
        ("train: {seed: 1}\noptim: {lr: 1}\ntrain: {epochs: 3}", "'train' in line 3 is already"),
    ],
)
def test_a_wrong_file_is_refused_naming_file_key_and_value(
    tmp_path: Path, text: str, message: str
) -> None:
    file = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as caught:
        read("--config", file)
    assert message.format(file=file) in str(caught.value)


def test_a_name_too_long_for_a_file_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        read(f"--config={'x' * 300}")


def test_a_folder_does_not_hide_the_shipped_config_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fast").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read("--config=fast") != Config()


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"there is no config file /nowhere/c\.yaml"):
        read("--config=/nowhere/c.yaml")


def test_splits_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        from_mapping({"splits": {"val_fraction": 0.5, "test_fraction": 0.5}}, where="here")


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_config_file_can_be_read_and_has_a_header(path: Path) -> None:
    read("--config", str(path))
    assert read("--config", path.stem) == read("--config", str(path))
    header = path.read_text().partition("\n\n")[0]
    assert header.startswith("#")
    assert all(word in path.read_text() for word in ("Hardware:", "Expected:"))


def test_every_key_has_a_meaning_and_numbers_have_bounds() -> None:
    for spec in all_keys():
        assert len(spec.meaning) > 5
        if get_origin(spec.type) is not Literal and spec.type in (int, float):
            assert spec.interval, f"{spec.name} would take any number"
    assert {field.name for field in dataclasses.fields(Config)} == {
        spec.name.partition(".")[0] for spec in all_keys()
    }


# ------------------------------------------------------------------------- files made to do harm


def nested(template: str, first: str, *, levels: int = 11, times: int = 9) -> str:
    """YAML in which each level names the one before it nine times."""
    lines = [f"a0: &a0 {first}"]
    for level in range(1, levels):
        aliases = ", ".join([f"*a{level - 1}"] * times)
        lines.append(f"a{level}: &a{level} {template.format(aliases)}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (nested("[{}]", "[x, x]"), "it is too large once its aliases are replaced"),
        (nested("{{<<: [{}]}}", "{x: 1}"), "it is too large once its aliases are replaced"),
        (f"a: &a {'x' * 60_000}\ntrain: [*a, *a]", "it is too large once its aliases are replaced"),
        ("[" * 60_000, "nested more than 20 levels"),
        ("{a: " * 15_000, "nested more than 20 levels"),
        ("- " * 30_000, "nested more than 20 levels"),
        ("#" * 70_000, "it has more than 65536 bytes"),
        ("train: {epochs: 2020-99-99}", "month must be in"),
        (f"train: {{epochs: {'9' * 5000}}}", "Exceeds the limit"),
        (f"optim: {{lr: {'9' * 500}}}", "is not allowed"),
        ("!!timestamp x", "is not valid YAML"),
        ("train: !!bool x", "is not valid YAML"),
        ("train: {epochs: !!int ''}", "is not valid YAML"),
        ("&a !!str {=: *a}", "is not valid YAML"),
        ("!!map x", "is not valid YAML"),
        ("{[a]: 1}", "is not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("train: &a {epochs: *a}", "is not allowed"),
        ("cache: {max_gib: .inf}", "is not allowed"),
        ("cache: {max_gib: 1e300}", "is not allowed"),
        ("train: {timeout_s: 1e300}", "is not allowed"),
    ],
)
def test_no_yaml_takes_the_memory_or_ends_in_a_traceback(
    text: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_file(str(tmp_path / "c.yaml"))


def test_an_alias_of_a_value_may_stand_in_a_config(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("optim: {lr: &a 0.01}\naugment: {scale: *a}\ntrain: &b {}")
    assert read_file(str(tmp_path / "c.yaml")) == {"optim.lr": 0.01, "augment.scale": 0.01}


def test_a_config_may_be_a_pipe_which_is_read_once() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"train: {epochs: 7}")
    os.close(writer)
    assert read_file(f"/dev/fd/{reader}") == {"train.epochs": 7}
    os.close(reader)


@pytest.mark.parametrize("name", ["/dev/zero", "/proc/self/mem", "/", "a\0b"])
def test_what_is_no_file_is_no_config(name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read|is not valid YAML"):
        read_file(name)
