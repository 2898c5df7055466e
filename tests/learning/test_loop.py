import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests.learning import fakes
from tests.learning.fakes import DISC, FakeBatch, FakeLoader, Outcome, poison, train_discs
from xrai.config import Checkpoint, Config, Model, Optim, Train
from xrai.errors import ConfigError, CorruptError, TrainingError, UserError
from xrai.files import sha256_of
from xrai.labels import UNKNOWN, Task
from xrai.learning import loop, optim
from xrai.learning.distributed import Ranks, join
from xrai.learning.loop import explaining_memory, profile_steps, rank_batch_size, resolve_precision
from xrai.learning.network import Network
from xrai.learning.optim import image_losses, make_objective
from xrai.learning.predictor import build_model, predict_split
from xrai.log import progress

SMALL = Config(train=Train(epochs=2, global_batch_size=32, precision="off", threads=1))
TINY = dataclasses.replace(  # where fp16 takes long
    SMALL, model=Model(width=8), train=dataclasses.replace(SMALL.train, global_batch_size=8)
)
WEIGHT = "head.weight"  # of the network


@pytest.fixture
def alone() -> Any:
    torch.set_num_threads(1)
    with join(timeout_s=10) as ranks:
        yield ranks


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **keys)
            for name, keys in sections.items()
        },
    )


def same(first: Outcome, second: Outcome) -> bool:
    return first.weights == second.weights  # bit for bit


def test_discs_are_learnt(alone: Ranks) -> None:
    outcome = train_discs(changed(SMALL, train={"epochs": 8}), ranks=alone, num_images=300)
    last = outcome.results[-1]
    assert last.val_loss < 0.5 * outcome.results[0].val_loss
    assert last.train_accuracy > 0.85


def test_the_same_run_twice_has_the_same_weights_bit_for_bit(alone: Ranks) -> None:
    assert same(train_discs(SMALL, ranks=alone), train_discs(SMALL, ranks=alone))


def test_another_seed_gives_other_weights(alone: Ranks) -> None:
    assert not same(
        train_discs(SMALL, ranks=alone), train_discs(changed(SMALL, train={"seed": 1}), ranks=alone)
    )


@pytest.mark.parametrize(
    ("task", "steps"), [("binary", range(1, 7)), ("multiclass", [2]), ("multilabel", [4])]
)
def test_a_run_stopped_after_any_step_and_resumed_ends_bit_for_bit_the_same(
    alone: Ranks, tmp_path: Path, task: Task, steps: Sequence[int]
) -> None:
    train = partial(train_discs, SMALL, ranks=alone, task=task, num_images=70, num_val=9)
    whole = train()
    for step in steps:  # of 2 epochs of 3 steps
        folder = tmp_path / str(step)
        first = train(folder=folder, stop_after=step)
        assert first.stopped and len(first.losses) == step
        second = train(folder=folder)
        assert not second.stopped
        assert first.losses + second.losses == whole.losses
        assert same(whole, second), f"stopped after step {step}"


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("weights of this network", lambda state: state.pop("model")),
        ("weights of this network", lambda state: state.update(average={"head.weight": 1})),
        ("size mismatch", lambda state: state["model"].update({WEIGHT: torch.zeros(3)})),
        ("not finite: " + WEIGHT, lambda state: state["average"][WEIGHT].fill_(math.nan)),
        ("KeyError", lambda state: state.pop("optimizer")),
        ("the optimizer's moments", lambda state: state["optimizer"]["state"][0].pop("exp_avg")),
        (
            "the optimizer's moments",
            lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
        ),
        ("Progress", lambda state: state["progress"].update(step="3")),
        ("Progress", lambda state: state["progress"].update(step=-10)),
        ("'other'", lambda state: state["progress"].update(other=1)),
        ("not enough values", lambda state: state.update(sums=[[1.0]])),
        ("NaN", lambda state: state.update(sums=[[1.0, math.nan, 1]])),
    ],
)
def test_a_forged_checkpoint_is_refused_though_its_hash_is_right(
    alone: Ranks, tmp_path: Path, words: str, change: Callable[[dict[str, Any]], object]
) -> None:
    train_discs(SMALL, ranks=alone, folder=tmp_path, stop_after=3)
    (path,) = (tmp_path / "checkpoints").glob("*.pt")
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    for mark in path.parent.glob("*.json"):
        facts = {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
        mark.write_text(json.dumps(json.loads(mark.read_text()) | facts))
    with pytest.raises(CorruptError, match=words):
        train_discs(SMALL, ranks=alone, folder=tmp_path)


def test_a_resumed_run_takes_a_changed_weight_decay(alone: Ranks, tmp_path: Path) -> None:
    train_discs(SMALL, ranks=alone, folder=tmp_path / "a", stop_after=3)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    other = changed(SMALL, optim={"weight_decay": 0.5})
    same_decay = train_discs(SMALL, ranks=alone, folder=tmp_path / "a")
    assert not same(same_decay, train_discs(other, ranks=alone, folder=tmp_path / "b"))


def test_a_run_stopped_many_times_tells_the_same_story(alone: Ranks, tmp_path: Path) -> None:
    whole = train_discs(SMALL, ranks=alone)
    results: list[Any] = []
    losses: list[float] = []
    outcome = None
    for _ in range(6):
        outcome = train_discs(SMALL, ranks=alone, folder=tmp_path, stop_after=2)
        results, losses = results + outcome.results, losses + outcome.losses
        if not outcome.stopped:
            break
    assert outcome is not None and not outcome.stopped and same(whole, outcome)
    assert losses == whole.losses
    assert [result.epoch for result in results] == [0, 1]
    for ours, theirs in zip(results, whole.results, strict=True):
        assert ours.train_loss == theirs.train_loss and ours.train_accuracy == theirs.train_accuracy
        assert (
            np.array_equal(ours.val.logits, theirs.val.logits) and ours.val_loss == theirs.val_loss
        )
        assert np.array_equal(ours.shifted.logits, theirs.shifted.logits)


def test_an_epoch_resumed_after_its_last_step_tells_what_that_step_was(
    alone: Ranks, tmp_path: Path
) -> None:
    whole = train_discs(changed(SMALL, train={"epochs": 1}), ranks=alone)
    num_steps = len(whole.losses)
    config = changed(SMALL, train={"epochs": 1}, checkpoint={"every": num_steps})
    train_discs(config, ranks=alone, folder=tmp_path, stop_after=num_steps)
    (result,) = train_discs(config, ranks=alone, folder=tmp_path).results
    (expected,) = whole.results
    assert result.lr == expected.lr > 0 and result.grad_norm == expected.grad_norm > 0
    assert result.train_loss == expected.train_loss and math.isnan(result.images_per_s)


def test_a_resumed_epoch_shows_the_steps_that_were_done_before(
    alone: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_discs(SMALL, ranks=alone, folder=tmp_path, stop_after=2)
    shown = mock.Mock(wraps=progress)
    monkeypatch.setattr("xrai.learning.loop.progress", shown)
    second = train_discs(SMALL, ranks=alone, folder=tmp_path)
    num_steps = (len(first.losses) + len(second.losses)) // 2  # of an epoch
    assert num_steps > 2
    assert [call.kwargs["done"] for call in shown.call_args_list] == [2, 0]


def test_a_finished_run_does_nothing_more(alone: Ranks, tmp_path: Path) -> None:
    train_discs(SMALL, ranks=alone, folder=tmp_path)
    again = train_discs(SMALL, ranks=alone, folder=tmp_path)
    assert again.losses == [] and not again.stopped


def test_accumulation_equals_the_batch_as_a_whole(alone: Ranks) -> None:
    exact = changed(SMALL, train={"precision": "fp64", "epochs": 1})
    train = partial(train_discs, ranks=alone, num_images=86, num_val=9)
    whole = train(exact)
    for parts in (2, 4):
        summed = train(changed(exact, train={"accumulation_steps": parts}))
        assert summed.losses == pytest.approx(whole.losses, rel=0, abs=1e-10)
        for name, values in whole.weights.items():
            assert np.allclose(summed.weights[name], values, rtol=0, atol=1e-10), name


def test_a_finding_that_no_image_of_a_batch_knows_leaves_its_weights_alone(alone: Ranks) -> None:
    def forget(loader: FakeLoader) -> None:
        loader.labels = loader.labels.copy()
        loader.labels[:, 1] = UNKNOWN

    optim = {"name": "sgd", "weight_decay": 0.0}
    once = changed(SMALL, train={"max_steps": 1}, optim=optim)
    after = train_discs(once, ranks=alone, task="multilabel", damage=forget).weights
    torch.manual_seed(once.train.seed)
    head = build_model(once.model, 3).state_dict()
    own = torch.tensor(after["head.weight"]).reshape(3, -1)
    assert [torch.equal(*rows) for rows in zip(own, head["head.weight"], strict=True)] == [
        False,
        True,
        False,
    ]
    own = torch.tensor(after["head.bias"])
    assert [torch.equal(*rows) for rows in zip(own, head["head.bias"], strict=True)] == [
        False,
        True,
        False,
    ]


def test_every_image_is_trained_on_once_an_epoch_ragged_end_included(alone: Ranks) -> None:
    seen: list[int] = []

    class Watched(FakeLoader):
        def epoch(self, epoch: int, *, start: int = 0) -> Iterator[FakeBatch]:
            for batch in super().epoch(epoch, start=start):
                seen.extend(batch.rows.tolist())
                yield batch

    def watch(loader: FakeLoader) -> None:
        loader.__class__ = Watched

    outcome = train_discs(
        changed(SMALL, train={"epochs": 1}), ranks=alone, num_images=101, damage=watch
    )
    assert sorted(seen) == list(range(101)) and len(outcome.losses) == 4
    (result,) = outcome.results
    assert result.images_per_s * result.seconds["epoch"] == pytest.approx(101)


def test_limits_in_steps_and_minutes_stop_and_still_measure(alone: Ranks) -> None:
    by_steps = train_discs(changed(SMALL, train={"max_steps": 7}), ranks=alone)
    assert len(by_steps.losses) == 7 and [result.step for result in by_steps.results] == [5, 7]
    by_minutes = train_discs(changed(SMALL, train={"max_minutes": 1e-6}), ranks=alone)
    assert len(by_minutes.losses) == 1 and len(by_minutes.results) == 1


def test_minutes_that_pass_in_the_validation_start_no_further_epoch(
    alone: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed_s = 0.0

    def wait(*arguments: Any, **options: Any) -> Any:
        nonlocal passed_s
        passed_s += 3600
        return predict_split(*arguments, **options)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed_s)
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(loop, "predict_split", wait)
    config = changed(SMALL, train={"max_minutes": 30})
    first = train_discs(config, ranks=alone, folder=tmp_path)
    assert len(first.losses) == 5 and len(first.results) == 1  # an epoch has 5 steps
    again = train_discs(config, ranks=alone, folder=tmp_path)
    assert (again.losses, again.results) == ([], [])


@pytest.mark.parametrize("limits", [{"max_steps": 2}, {"max_steps": 3}, {"max_minutes": 1e-6}])
@pytest.mark.parametrize("num_before", [3, 8])
def test_an_epoch_resumed_beyond_a_limit_is_validated_as_it_is(
    alone: Ranks, tmp_path: Path, limits: dict[str, Any], num_before: int
) -> None:
    train_discs(SMALL, ranks=alone, folder=tmp_path, stop_after=num_before)
    config = changed(SMALL, train=limits)
    ended = train_discs(config, ranks=alone, folder=tmp_path)
    assert ended.losses == [] and [result.step for result in ended.results] == [num_before]
    again = train_discs(config, ranks=alone, folder=tmp_path)
    assert (again.losses, again.results) == ([], [])


def test_patience_stops_after_epochs_without_a_better_score(alone: Ranks) -> None:
    still = changed(SMALL, train={"epochs": 50, "patience": 2}, optim={"lr": 1e-30})
    assert len(train_discs(still, ranks=alone, num_images=40).results) in (2, 3, 4)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_images(
    alone: Ranks, tmp_path: Path
) -> None:
    config = changed(SMALL, checkpoint={"every": 1, "keep_last": 50})
    with pytest.raises(
        TrainingError,
        match=r"step 4 \(epoch 1, batch 4\): the loss of 2 images is not finite: disc-\d+, "
        r"disc-\d+;",
    ):
        train_discs(config, ranks=alone, folder=tmp_path, damage=poison(4))
    steps = sorted(
        int(path.stem.partition("-")[2]) for path in (tmp_path / "checkpoints").glob("step-*.pt")
    )
    assert steps == [1, 2, 3]


@pytest.mark.parametrize(
    ("precision", "name", "bad"),
    [
        ("off", "adamw", 1),
        ("off", "sgd", 3),
        ("bf16", "adamw", 3),
        ("fp16", "adamw", 3),
        ("fp16", "sgd", 1),
    ],
)
def test_steps_after_one_that_is_not_finite_change_no_weight_until_it_is_told(
    alone: Ranks, monkeypatch: pytest.MonkeyPatch, precision: str, name: str, bad: int
) -> None:
    trained: list[Network] = []

    def build(*arguments: Any, **options: Any) -> Network:
        trained.append(build_model(*arguments, **options))
        return trained[-1]

    monkeypatch.setattr(fakes, "build_model", build)
    train = {"precision": precision, "log_every": 5, "max_steps": bad - 1}
    config = changed(TINY, train=train, optim={"name": name, "lr": 0.01})
    discs: dict[str, Any] = {"ranks": alone, "num_images": 8 * 8, "num_val": 4}
    seen: list[int] = []
    with pytest.raises(
        TrainingError, match=rf"step {bad} \(epoch 1, batch {bad}\): the loss of 2 images"
    ):
        damage = watched(poison(bad, places=(0, 5)), seen)
        train_discs(changed(config, train={"max_steps": 0}), damage=damage, **discs)
    if bad > 1:
        train_discs(config, **discs)
    else:
        torch.manual_seed(config.train.seed)
        build(config.model, 1)
    assert len(seen) == 5  # of the 8 steps of the epoch
    found, before = (network.state_dict() for network in trained)
    assert all(torch.equal(found[key], before[key]) for key in before)


def watched(damage: Callable[[FakeLoader], None], seen: list[int]) -> Callable[[FakeLoader], None]:
    """The same, which notes the number of images of each batch that is asked for."""

    def change(loader: FakeLoader) -> None:
        damage(loader)
        original = loader.epoch

        def epoch(epoch: int, *, start: int = 0) -> Iterator[FakeBatch]:
            for batch in original(epoch, start=start):
                seen.append(len(batch.rows))
                yield batch

        loader.epoch = epoch  # type: ignore[method-assign]

    return change


def test_a_gradient_that_is_not_finite_names_its_whole_batch(
    alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip_gradients = optim.clip_gradients
    norms: list[torch.Tensor] = []

    def clip(*arguments: Any) -> torch.Tensor:
        norms.append(clip_gradients(*arguments))
        return norms[-1] * (math.inf if len(norms) == 2 else 1)

    monkeypatch.setattr(optim, "clip_gradients", clip)
    with pytest.raises(
        TrainingError,
        match=r"step 2 .*: the gradient is not finite \(norm inf\) though the losses are; its "
        r"batch had 32 images: disc-\d+, .*, …;",
    ):
        train_discs(SMALL, ranks=alone)


@pytest.mark.parametrize("name", ["adamw", pytest.param("sgd", marks=pytest.mark.ci)])
def test_fp16_skips_steps_whose_gradients_overflow_and_goes_on(
    alone: Ranks, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # so large that the first gradients are infinite in fp16; each time it is halved
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**24)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    skipped: list[torch.Tensor] = []
    step = optim.step

    def note(optimizer: Any, scaler: Any, is_bad: torch.Tensor) -> None:
        skipped.append(is_bad)
        step(optimizer, scaler, is_bad)

    monkeypatch.setattr(optim, "step", note)
    of_optim = {"name": name, "lr": 0.01}
    config = changed(TINY, train={"precision": "fp16", "epochs": 5}, optim=of_optim)
    outcome = train_discs(config, ranks=alone, num_images=48, num_val=9)
    assert skipped[0] and not skipped[-1] and 0 < sum(map(bool, skipped)) < 25
    assert sum(outcome.losses[-6:]) < sum(outcome.losses[:6]) and len(outcome.results) == 5


def test_a_batch_that_ranks_do_not_divide_is_refused_with_the_nearest_that_do() -> None:
    assert rank_batch_size(Train(global_batch_size=64), world_size=4) == 16
    with pytest.raises(
        UserError, match=r"64 cannot be shared by 3 ranks.*nearest that can is 63 or 66"
    ):
        rank_batch_size(Train(global_batch_size=64), world_size=3)
    with pytest.raises(UserError, match=r"nearest that can is 8$"):
        rank_batch_size(Train(global_batch_size=4), world_size=8)
    with pytest.raises(UserError, match=r"parts of train\.accumulation_steps = 4"):
        rank_batch_size(Train(global_batch_size=2, accumulation_steps=4), world_size=1)


@pytest.mark.parametrize(
    "precision", ["bf16", pytest.param("fp16", marks=pytest.mark.ci), "off", "fp64", "auto"]
)
def test_every_precision_trains_on_the_cpu(alone: Ranks, precision: str) -> None:
    config = changed(SMALL, train={"precision": precision})
    outcome = train_discs(config, ranks=alone, num_images=96, num_val=9)
    assert outcome.losses[-1] < outcome.losses[0]
    assert resolve_precision(precision, torch.device("cpu")) in ("bf16", "fp16", "off", "fp64")


def test_fp16_goes_on_bit_for_bit_with_its_scaler(alone: Ranks, tmp_path: Path) -> None:
    config = changed(TINY, train={"precision": "fp16"})
    train = partial(train_discs, config, ranks=alone, num_images=16, num_val=5)
    whole = train()
    assert len(train(folder=tmp_path, stop_after=3).losses) == 3
    assert same(whole, train(folder=tmp_path))


def test_sgd_learns_too(alone: Ranks) -> None:
    config = dataclasses.replace(
        SMALL, optim=Optim(name="sgd", lr=0.1, weight_decay=1e-4), checkpoint=Checkpoint()
    )
    outcome = train_discs(changed(config, train={"epochs": 6}), ranks=alone)
    assert outcome.losses[-2] < 0.8 * outcome.losses[0]


def test_fifty_steps_give_the_losses_that_were_stored(alone: Ranks) -> None:
    """A change of these losses is a change of the recipe or of the mathematics: say which in the
    commit.
    """
    stored = json.loads(Path(__file__).with_name("golden_losses.json").read_text())
    outcome = train_discs(changed(SMALL, train={"precision": "fp64", "epochs": 10}), ranks=alone)
    assert len(outcome.losses) == 50
    assert outcome.losses == pytest.approx(stored, rel=1e-6)


def test_the_steps_asked_for_are_profiled_into_a_chrome_trace(alone: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    train_discs(
        changed(SMALL, train={"epochs": 1, "profile": "2:3"}), ranks=alone, profile_path=path
    )
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    assert any("convolution" in name for name in names)
    assert any("ProfilerStep" in name or "Optimizer.step" in name for name in names)


def test_a_training_that_ends_within_the_profiled_steps_writes_them_or_else_warns(
    alone: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "profile.json"
    within = changed(SMALL, train={"epochs": 1, "profile": "4:99"})
    with caplog.at_level("INFO"):
        train_discs(within, ranks=alone, profile_path=path)
    assert json.loads(path.read_text())["traceEvents"]
    assert f"steps up to 5 are profiled in {path}" in caplog.messages
    path.unlink()
    train_discs(
        changed(SMALL, train={"epochs": 1, "profile": "6:9"}), ranks=alone, profile_path=path
    )
    assert not path.exists()
    told = "no step of train.profile = 6:9 was recorded: this process ends after step 5"
    assert told in caplog.messages


@pytest.mark.parametrize("text", ["5", "0:3", "5:4", "a:b", "1:2:3"])
def test_profiled_steps_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="it takes steps A:B"):
        profile_steps(text)


def test_too_little_memory_says_which_batch_to_try() -> None:
    with (
        pytest.raises(
            TrainingError,
            match=r"with 32 images at a time: try --train\.accumulation_steps=2 \(16 at a time",
        ),
        explaining_memory(Train(global_batch_size=64), world_size=2),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_weighting_the_classes_equals_counting_each_image_so_often() -> None:
    weighted = make_objective(DISC, ((90, 120),), Optim(class_weighting=1.0))
    assert weighted.weights.flatten().tolist() == pytest.approx([2.0, 2 / 3])
    unweighted = make_objective(DISC, ((90, 120),), Optim())
    assert unweighted.weights.flatten().tolist() == [1.0, 1.0]
    logits, labels = torch.tensor([[0.2], [-0.4]]), torch.tensor([0, 1], dtype=torch.uint8)
    plain = image_losses(logits, labels, unweighted)
    assert image_losses(logits, labels, weighted).tolist() == pytest.approx(
        [plain[0].item() * 2, plain[1].item() * 2 / 3]
    )


def test_patience_that_is_used_up_stays_so_after_a_restart(alone: Ranks, tmp_path: Path) -> None:
    still = changed(SMALL, train={"epochs": 50, "patience": 1}, optim={"lr": 1e-30})
    first = train_discs(still, ranks=alone, num_images=40, folder=tmp_path)
    assert 0 < len(first.losses) < 100
    assert train_discs(still, ranks=alone, num_images=40, folder=tmp_path).losses == []


def test_a_compiled_network_learns_the_same(alone: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    # The graph is captured as always; making machine code of it takes minutes on the CPU and is
    # left out here
    compiled = []

    def capture(network: torch.nn.Module) -> Any:
        compiled.append(network)
        return original(network, backend="eager")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", capture)
    config = changed(SMALL, train={"epochs": 1, "compile": True})
    outcome = train_discs(config, ranks=alone)
    assert len(compiled) == 1
    assert outcome.losses == pytest.approx(
        train_discs(changed(SMALL, train={"epochs": 1}), ranks=alone).losses, rel=1e-4
    )
