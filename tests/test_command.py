"""How a command reads its command line, remembers what was given, and ends."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from xrai.command import Flag, Parsed, parse, run_command
from xrai.config import USES, Config, all_keys, from_mapping
from xrai.errors import ConfigError, StoppedError, TrainingError, UserError

REPOSITORY = Path(__file__).parents[1]


def read(*arguments: str, command: str = "train") -> Parsed:
    return parse(command, arguments, description="d")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_the_file_wherever_it_stands(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "train: {epochs: 3, seed: 5}\noptim: {lr: 1e-3}\n")
    for arguments in (
        ["--config", file, "--train.epochs=7"],
        ["--train.epochs", "7", f"--config={file}"],
    ):
        config = read(*arguments).config
        assert (config.train.epochs, config.train.seed, config.optim.lr) == (7, 5, 0.001)


def test_a_later_file_wins_over_an_earlier_one(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "train: {epochs: 3, seed: 1}")
    second = write(tmp_path / "b.yaml", "train: {epochs: 4}")
    config = read("--config", first, "--config", second).config
    assert (config.train.epochs, config.train.seed) == (4, 1)


def test_what_was_given_is_remembered_even_where_it_equals_the_default(tmp_path: Path) -> None:
    assert read().given == set()
    assert read("--images.size=64").given == {"images.size"}
    file = write(tmp_path / "c.yaml", "images: {size: 64}\nsplits: {val_fraction: 0.1}")
    assert read("--config", file, "--optim.lr=0.003").given == {"images.size", "optim.lr"}
    assert read("--config", file, command="verify").given == set()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--optim.lrr=3",
            "unknown option --optim.lrr (value '3') of xrai train; did you mean --optim.lr?",
        ),
        ("--epochs=3", "did you mean --train.epochs?"),
        ("--zzz", "unknown option --zzz of xrai train; --help lists what is allowed"),
        ("--train.epochs=", "train.epochs = '' is not allowed: it takes a whole number"),
        ("--train.epochs=2020-01-01", "train.epochs = '2020-01-01' is not allowed"),
        ("--train.epochs=3.5", "train.epochs = 3.5 is not allowed"),
        ("--train.compile=~", "train.compile = '~' is not allowed: it takes true or false"),
        (
            "--train.epochs=x",
            "train.epochs = 'x' is not allowed: it takes a whole number at least 1 and at most "
            "100000",
        ),
        ("--train.epochs=0", "train.epochs = 0 is not allowed"),
        ("--train.epochs=100001", "train.epochs = 100001 is not allowed"),
        ("--train.epochs=1.5", "train.epochs = 1.5 is not allowed"),
        ("--train.epochs=true", "train.epochs = 'true' is not allowed"),
        ("--train.epoch", "did you mean --train.epochs?"),
        ("--train.precision=half", "it takes one of auto, bf16, fp16, off, fp64"),
        ("--optim.lr=0", "it takes a number above 0 and at most 100"),
        ("--optim.lr=nan", "optim.lr = 'nan' is not allowed"),
        ("--optim.lr=.inf", "optim.lr = inf is not allowed"),
        ("--optim.momentum=1", "it takes a number at least 0 and below 1"),
        ("--optim.clip_norm=.inf", "optim.clip_norm = inf is not allowed"),
        ("--images.fit=stretch", "it takes one of crop, squash, pad"),
        ("--optim.lr", "expected one argument"),
        ("--train.compile=3", "it takes true or false"),
        ("surplus", "unexpected argument 'surplus'"),
    ],
)
def test_a_wrong_option_is_refused_with_key_value_and_what_is_allowed(
    argument: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(argument)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("command", "argument", "takers"),
    [
        ("verify", "--optim.lr=5", "section optim belongs to xrai train"),
        ("verify", "--optim.lrr=5", "section optim belongs to xrai train"),
        ("train", "--shards.rows=7", "section shards belongs to xrai preprocess"),
        ("predict", "--train.epochs=7", "section train belongs to xrai train"),
        ("export", "--images.size", "section images belongs to xrai preprocess, train, predict"),
    ],
)
def test_a_flag_of_other_commands_is_refused_naming_them(
    command: str, argument: str, takers: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(argument, command=command)
    name = argument.partition("=")[0]
    assert str(caught.value) == f"xrai {command} does not take {name}: {takers}"


@pytest.mark.parametrize("command", USES)
def test_one_config_file_serves_all_commands_and_is_checked_by_each(
    command: str, tmp_path: Path
) -> None:
    assert read("--config", str(REPOSITORY / "configs/fast.yaml"), command=command)
    with pytest.raises(ConfigError, match=r"optim\.lr = -1 in .* is not allowed"):
        read("--config", write(tmp_path / "c.yaml", "optim: {lr: -1}"), command=command)


def test_a_config_that_comes_with_xrai_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read("--config", "fast").config.train.epochs == 8
    with pytest.raises(
        ConfigError, match=r"there is no config file fats; .* or fast, gpu, pneumonia, "
    ):
        read("--config", "fats")
    (tmp_path / "fast").write_text("train: {epochs: 5}")
    assert read("--config", "fast").config.train.epochs == 5


def test_flags_take_their_default_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [
        Flag("dataset", "data/dataset", "address", "XRAI_DATASET"),
        Flag("check", False, "dry run", type=bool),
    ]

    def values(*arguments: str) -> dict[str, object]:
        return parse("train", arguments, description="d", flags=flags).flags

    assert values() == {"dataset": "data/dataset", "check": False}
    monkeypatch.setenv("XRAI_DATASET", "s3://bucket/set")
    assert values("--check") == {"dataset": "s3://bucket/set", "check": True}
    assert values("--dataset=here")["dataset"] == "here"
    monkeypatch.setenv("XRAI_DATASET", "")
    assert values()["dataset"] == "data/dataset"


def test_paths_may_stand_before_and_after_flags() -> None:
    flags = [Flag("run", "", "address"), Flag("paths", [], "files", nargs="*")]
    found = parse("predict", ["a", "--run", "r", "b"], description="d", flags=flags).flags
    assert found == {"run": "r", "paths": ["a", "b"]}
    assert parse("predict", [], description="d", flags=flags).flags["paths"] == []


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        flags = [Flag("dataset", "x", "address", "XRAI_DATASET")]
        parse(command, ["--help"], description="d", flags=flags)
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_lists_the_commands_keys_with_default_and_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = {command: help_of(command, capsys) for command in USES}
    for spec in all_keys():
        takers = {
            command
            for command, names in USES.items()
            if {spec.name, spec.name.partition(".")[0]} & set(names)
        }
        assert takers, f"no command takes {spec.name}"
        assert {command for command in USES if f"--{spec.name} " in text[command]} == takers
        for command in takers:
            assert " ".join(spec.meaning.split()) in text[command]
            if spec.default != "":
                assert f"default: {spec.default}" in text[command], spec.name
    assert all("environment: XRAI_DATASET" in each for each in text.values())
    assert all(each.startswith(f"usage: xrai {command}") for command, each in text.items())


def test_print_config_prints_what_a_config_file_can_hold(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--train.epochs=9", "--print_config")
    assert caught.value.code == 0
    assert from_mapping(yaml.safe_load(capsys.readouterr().out), where="there").train.epochs == 9


def test_the_reference_recipe_is_the_defaults_but_for_pixels_channels_and_epochs() -> None:
    config = read("--config", str(REPOSITORY / "configs/pneumonia.yaml")).config
    images, model = (replace(Config().images, size=128), replace(Config().model, width=32))
    train = replace(Config().train, epochs=34)
    assert config == replace(Config(), images=images, model=model, train=train)


# ------------------------------------------------------------------------------------ run_command


def outcome(error: BaseException, *, rank: int, capsys: pytest.CaptureFixture[str]) -> object:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(fail, rank=rank)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_tells_what_all_ranks_meet_and_any_rank_what_it_meets_alone(
    rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    told = rank == 0
    assert outcome(UserError("a\n b"), rank=rank, capsys=capsys) == (2, "xrai: error: a b\n" * told)
    assert outcome(StoppedError("c"), rank=rank, capsys=capsys) == (143, "xrai: c\n" * told)
    assert outcome(TrainingError("d"), rank=rank, capsys=capsys) == (1, "xrai: error: d\n")
    assert outcome(KeyboardInterrupt(), rank=rank, capsys=capsys) == (130, "xrai: interrupted\n")


def test_stray_variables_of_torchrun_change_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xrai.train", f"--dataset={tmp_path}"],
        env={**os.environ, "RANK": "1", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("xrai: error: ") and "holds no dataset.json" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_names_after_a_double_dash_may_begin_with_a_dash() -> None:
    flags = (Flag("paths", [], "files", nargs="*"),)

    def paths(*arguments: str) -> object:
        return parse("predict", arguments, description="d", flags=flags).flags["paths"]

    assert paths("a.png", "--train.threads=1", "--", "-b.png", "--c.png") == [
        "a.png",
        "-b.png",
        "--c.png",
    ]
    assert paths("--", "-b.png") == ["-b.png"]
    with pytest.raises(ConfigError, match="unexpected argument 'x'; see xrai train --help"):
        read("--", "x")


def test_evaluate_takes_the_keys_that_it_uses() -> None:
    parsed = read("--loader.threads=2", "--train.timeout_s=9", command="evaluate")
    assert parsed.given == {"loader.threads", "train.timeout_s"}
