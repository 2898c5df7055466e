"""Training on a GPU: it learns, waits for the device seldom, goes on exactly, and says what is
wrong.
"""

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.learning import fakes
from tests.learning.fakes import Outcome, poison, train_discs
from tests.learning.syncs import Syncs
from tests.learning.test_loop import changed, same
from xrai.config import Augment, Config, Model, Optim, Train
from xrai.errors import TrainingError
from xrai.labels import Task
from xrai.learning import loop, optim
from xrai.learning.augment import augment, uniform
from xrai.learning.batch import DeviceBatch, to_device
from xrai.learning.distributed import Ranks
from xrai.learning.loop import explaining_memory
from xrai.learning.network import Network
from xrai.learning.predictor import build_model

CPU = Ranks(0, 1, 0, 1, torch.device("cpu"))
SMALL = Config(
    model=Model(width=8),
    train=Train(epochs=2, global_batch_size=16, precision="off", log_every=3, threads=1),
)
FEW: dict[str, Any] = {"num_images": 78, "num_val": 9}  # 5 steps an epoch
# A CPU without fp16 takes long; tests/learning/test_loop.py has smaller ones
FP16 = pytest.param("fp16", marks=pytest.mark.ci)
PRECISIONS = ["off", "bf16", FP16]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_discs_are_learnt(ranks: Ranks, precision: str) -> None:
    of_train = {"epochs": 6, "precision": precision, "global_batch_size": 8}
    config = changed(SMALL, train=of_train, optim={"lr": 6e-3, "ema_decay": 0.9})
    outcome = train_discs(config, ranks=ranks, num_images=64, num_val=20)
    assert outcome.results[-1].train_loss < 0.6 * outcome.results[0].train_loss
    assert np.isfinite(outcome.results[-1].val_loss)


# ---------------------------------------------------------------------------------------- waiting


@contextmanager
def refusing_to_wait(device: torch.device) -> Iterator[None]:
    """Raises in the block at the first call that waits for the device."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with Syncs() as syncs:
        yield
    assert not syncs.places, syncs.places


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_no_step_waits_for_the_device(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, precision: str, task: Task
) -> None:
    train_step, num_steps = loop.train_step, []

    def step(*arguments: Any) -> int:
        with refusing_to_wait(ranks.device):
            num_steps.append(1)
            return train_step(*arguments)

    monkeypatch.setattr(loop, "train_step", step)
    config = changed(SMALL, train={"precision": precision, "accumulation_steps": 2})
    train_discs(config, ranks=ranks, task=task, **FEW)
    assert len(num_steps) == 10


def test_a_step_that_waits_is_noticed(ranks: Ranks) -> None:
    norm = torch.ones((), device=ranks.device)
    with pytest.raises((RuntimeError, AssertionError)), refusing_to_wait(ranks.device):
        float(norm)


def test_batches_are_whole_however_long_steps_take(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xrai.learning.batch._MAX_BYTES_UNDER_WAY", 20_000)  # a few batches
    images, labels = fakes.make_discs(160)
    loader = fakes.FakeLoader(images, labels, batch_size=8, shuffle=True)
    load = torch.ones(1500 if device.type == "cuda" else 50, device=device).diag()
    found: list[torch.Tensor] = []

    def check(batch: DeviceBatch) -> None:
        nonlocal load
        for _ in range(8):  # the device is busy when the next copy begins
            load = load @ load
        found.append(torch.cat([batch.images.flatten(1).sum(1), batch.labels, batch.rows]))

    for batch in to_device(loader.epoch(1), device, is_ahead=True):
        check(batch)
    for own, given in zip(found, loader.epoch(1), strict=True):
        sums = given.images.reshape(len(given.rows), -1).sum(1, dtype=np.int64)
        expected = np.concatenate([sums, given.labels, given.rows])
        assert np.array_equal(own.cpu().numpy(), expected)


# ----------------------------------------------------------------------------- what is not finite


@pytest.mark.ci
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fp16_skips_what_overflows_and_goes_on(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**22)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    judged: list[torch.Tensor] = []
    step = optim.step

    def note(optimizer: Any, scaler: Any, is_bad: torch.Tensor) -> None:
        judged.append(is_bad)
        step(optimizer, scaler, is_bad)

    monkeypatch.setattr(optim, "step", note)
    of_optim = {"name": name, "lr": 0.01}
    of_train = {"precision": "fp16", "epochs": 4, "global_batch_size": 8}
    config = changed(SMALL, train=of_train, optim=of_optim)
    outcome = train_discs(config, ranks=ranks, num_images=40, num_val=5)
    assert judged[0] and not judged[-1] and sum(map(bool, judged)) < 15
    assert np.isfinite(outcome.losses).all()
    assert all(np.isfinite(values).all() for values in outcome.weights.values())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_loss_that_is_not_finite_changes_nothing_and_is_told_with_its_images(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, deterministic: None, precision: str
) -> None:
    trained: list[Network] = []

    def build(*arguments: Any, **options: Any) -> Network:
        trained.append(build_model(*arguments, **options))
        return trained[-1]

    monkeypatch.setattr(fakes, "build_model", build)
    config = changed(SMALL, train={"precision": precision})
    with pytest.raises(TrainingError, match=r"step 2 .*: the loss of 2 images is not finite"):
        train_discs(config, ranks=ranks, damage=poison(2), **FEW)
    train_discs(changed(config, train={"max_steps": 1}), ranks=ranks, **FEW)
    found, before = (network.state_dict() for network in trained)
    assert all(torch.equal(found[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimizer_skips_a_step_on_the_device(device: torch.device, name: str) -> None:
    network = build_model(Model(width=8), 1).to(device)
    optimizer = optim.make_optimizer(network, Optim(name=name))  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def step(is_bad: bool) -> dict[str, torch.Tensor]:
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, np.nan if is_bad else 0.1)
        with refusing_to_wait(device):
            optim.step(optimizer, scaler, torch.full((), int(is_bad), device=device) > 0)
        moments = dict(enumerate(optimizer.state.values()))
        found = {f"{at} {key}": of for at, own in moments.items() for key, of in own.items()}
        return {key: of.clone() for key, of in (found | network.state_dict()).items()}

    first, skipped = step(is_bad=False), step(is_bad=True)
    assert all(torch.equal(first[key], skipped[key]) for key in first)
    second = step(is_bad=False)
    assert not torch.equal(second["head.weight"], first["head.weight"])


# --------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_goes_on_bit_for_bit(
    ranks: Ranks, tmp_path: Path, deterministic: None, precision: str
) -> None:
    train = partial(train_discs, changed(SMALL, train={"precision": precision}), ranks=ranks, **FEW)
    whole = train()
    first = train(folder=tmp_path, stop_after=7)
    second = train(folder=tmp_path)
    assert first.stopped and first.losses + second.losses == whole.losses
    assert same(whole, second)
    last, own = second.results[-1], whole.results[-1]
    assert np.array_equal(last.val.logits, own.val.logits) and last.train_loss == own.train_loss


def test_a_run_begun_here_goes_on_on_the_cpu_and_back(ranks: Ranks, tmp_path: Path) -> None:
    train = partial(train_discs, changed(SMALL, train={"precision": "fp64"}), **FEW)
    whole = train(ranks=CPU)
    losses: list[float] = []
    outcome: Outcome | None = None
    for place, stop_after in ((ranks, 3), (CPU, 4), (ranks, None)):
        outcome = train(ranks=place, folder=tmp_path, stop_after=stop_after)
        losses += outcome.losses
    assert losses == pytest.approx(whole.losses, rel=1e-7)
    assert outcome is not None
    for name, values in whole.weights.items():
        assert np.allclose(outcome.weights[name], values, rtol=0, atol=1e-7), name


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp64", 1e-8), ("off", 1e-3), ("bf16", 0.05)]
)
def test_losses_are_those_of_the_cpu(
    ranks: Ranks, exact: None, precision: str, tolerance: float
) -> None:
    config = changed(SMALL, train={"precision": precision})
    here, there = (train_discs(config, ranks=place, **FEW) for place in (ranks, CPU))
    assert here.losses == pytest.approx(there.losses, rel=tolerance)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_several_outputs_are_those_of_the_cpu(ranks: Ranks, task: Task) -> None:
    config = changed(SMALL, train={"precision": "fp64", "epochs": 1})
    here, there = (train_discs(config, ranks=place, task=task, **FEW) for place in (ranks, CPU))
    assert here.losses == pytest.approx(there.losses, rel=1e-8)
    assert here.results[-1].train_accuracy == there.results[-1].train_accuracy
    assert np.allclose(here.results[-1].val.logits, there.results[-1].val.logits, atol=1e-7)


def test_a_batch_in_parts_equals_the_whole(ranks: Ranks) -> None:
    config = changed(SMALL, train={"precision": "fp64", "epochs": 1})
    whole, parts = (
        train_discs(changed(config, train={"accumulation_steps": num}), ranks=ranks, **FEW)
        for num in (1, 4)
    )
    assert parts.losses == pytest.approx(whole.losses, rel=1e-9)


def test_images_are_augmented_as_on_the_cpu(device: torch.device) -> None:
    rows = torch.arange(7, 2**40, 2**36)
    images = torch.rand(len(rows), 1, 40, 48, dtype=torch.float64)
    key: dict[str, Any] = {"seed": 2**31 - 1, "epoch": 17}
    assert torch.equal(uniform(rows.to(device), 99, **key).cpu(), uniform(rows, 99, **key))
    here, there = (
        augment(images.to(place), rows.to(place), strength=Augment(), **key)
        for place in (device, torch.device("cpu"))
    )
    assert torch.allclose(here.cpu(), there, rtol=0, atol=1e-9)


def test_clipping_and_averaging_are_those_of_the_cpu(device: torch.device) -> None:
    torch.manual_seed(0)
    found: list[list[torch.Tensor]] = []
    weights = build_model(Model(width=8), 1).state_dict()
    noise = {name: torch.randn_like(of) for name, of in weights.items()}
    for place in (device, torch.device("cpu")):
        network, average = (build_model(Model(width=8), 1).to(place) for _ in range(2))
        for model in (network, average):
            model.load_state_dict(weights)
        for name, parameter in network.named_parameters():
            parameter.grad = noise[name].to(place, copy=True)  # clipping changes it
        with refusing_to_wait(place):
            norm = optim.clip_gradients(network.parameters(), 1.0)
            with torch.no_grad():
                for parameter in network.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad)
            optim.update_average(average, network, step=5, decay=0.9)
        assert len(found) < 2
        found.append([norm.detach(), *(of.detach() for of in average.parameters())])
    for here, there in zip(*found, strict=True):
        assert torch.allclose(here.cpu(), there, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ memory and compile


def test_the_cure_that_is_named_when_memory_runs_out_is_one(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 1024 if ranks.device.type == "cuda" else 32
    config = changed(SMALL, train={"global_batch_size": size, "epochs": 1, "max_steps": 2})
    train = partial(train_discs, ranks=ranks, num_images=2 * size, num_val=4)
    whole = train(config)
    told, outcome = 0, whole
    with little_memory(ranks.device, monkeypatch, lambda parts: train(with_parts(config, parts))):
        parts = 1
        while True:
            try:
                with explaining_memory(with_parts(config, parts).train, world_size=1):
                    outcome = train(with_parts(config, parts))
                break
            except TrainingError as error:
                told += 1
                cure = re.search(r"--train\.accumulation_steps=(\d+)", str(error))
                assert cure is not None and int(cure[1]) == 2 * parts
                parts = int(cure[1])
            gc.collect()  # the frames of the failed training hold its tensors
    assert 1 <= told <= 5
    assert outcome.losses == pytest.approx(whole.losses, rel=1e-2)


def with_parts(config: Config, parts: int) -> Config:
    return changed(config, train={"accumulation_steps": parts})


@contextmanager
def little_memory(
    device: torch.device, patch: pytest.MonkeyPatch, train: Callable[[int], Outcome]
) -> Iterator[None]:
    """Memory for a batch in 16 parts, but not for the whole: on a GPU halfway between both peaks;
    on the CPU, for half of the images.
    """
    if device.type == "cuda":
        peaks = []
        for parts in (1, 16):
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            train(parts)
            peaks.append(torch.cuda.max_memory_reserved())
        assert peaks[0] > 1.2 * peaks[1], peaks
        total = torch.cuda.get_device_properties(device).total_memory
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(sum(peaks) / 2 / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return

    def refuse(network: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if network.training and len(inputs[0]) > 16:
            raise torch.OutOfMemoryError("no room")

    def build(*arguments: Any, **options: Any) -> Network:
        network = build_model(*arguments, **options)
        network.register_forward_pre_hook(refuse)
        return network

    with patch.context() as inner:
        inner.setattr(fakes, "build_model", build)
        yield


def test_an_epoch_states_the_memory_it_took(ranks: Ranks) -> None:
    config = changed(SMALL, train={"epochs": 1})
    (result,) = train_discs(config, ranks=ranks, **FEW).results
    assert 1 < result.peak_memory_mib < 100_000
    assert 0 <= result.data_wait_share < 1 and result.images_per_s > 0


@pytest.mark.ci
def test_a_compiled_network_learns_the_same(
    ranks: Ranks, exact: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ranks.device.type == "cpu":  # making machine code takes minutes there
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = changed(SMALL, train={"epochs": 1})
    compiled, plain = (
        train_discs(changed(config, train={"compile": on}), ranks=ranks, num_images=64, num_val=4)
        for on in (True, False)
    )
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-3)
