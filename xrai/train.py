"""Train a network: `torchrun --nproc_per_node=N -m xrai.train`, or without torchrun in one process.

All ranks open the data set and run the loop; rank 0 alone owns the run's folder. A run whose name
exists is resumed from its newest checkpoint. At the end the best epoch's weights are measured on
images that they have not seen.
"""

import ctypes
import dataclasses
import functools
import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from xrai.command import Flag, Parsed, parse, run_command
from xrai.config import TIMM, Config, Images
from xrai.dataset.loader import Loader, open_split
from xrai.dataset.shards import DatasetIndex
from xrai.dataset.unlike import Unlike
from xrai.dataset.verify import find_faults_soon
from xrai.errors import ConfigError, DatasetError, RunError, UserError
from xrai.files import cache_folder, num_cores
from xrai.labels import LabelSpec
from xrai.learning import loop
from xrai.learning.checkpoint import load_weights
from xrai.learning.distributed import (
    Place,
    Ranks,
    join,
    own_place,
    record_failures,
    refuse_missing_devices,
)
from xrai.learning.network import Network
from xrai.learning.optim import Counts
from xrai.learning.predictor import Trained, build_model, predict_split
from xrai.learning.typicality import count_review, fit_typicality
from xrai.learning.weights import initial_weights
from xrai.log import counted, get_logger, setup_logging
from xrai.results.folder import RunFolder, new_run_id
from xrai.store import disk_path, masked, open_store
from xrai.workers import follow_parent

if TYPE_CHECKING:
    from xrai.run import Job

T = TypeVar("T")

FLAGS = (
    Flag("dataset", "data/dataset", "the data set: a folder or s3://bucket/prefix", "XRAI_DATASET"),
    Flag("artifacts", "submit", "where runs go: a folder or s3://bucket/prefix", "XRAI_ARTIFACTS"),
    Flag("run_id", "", "name of the run; default: the time and a short hash", "XRAI_RUN_ID"),
    Flag(
        "resume",
        "auto",
        "auto: resume a run of this name; must: refuse if there is none; never: if there is one; "
        "changed: resume one with another config",
    ),
    Flag(
        "init_from",
        "",
        "take the initial weights, and nothing else, from the finished run at this address, URI/ID",
    ),
    Flag(
        "check",
        False,
        "check config, data, run, devices, disk and permissions, and stop before training",
        type=bool,
    ),
    Flag(
        "check_ranks",
        0,
        "with --check: processes of the training, on all machines; 0: one",
        type=int,
    ),
    Flag("check_local_ranks", 0, "with --check: those of them on this machine; 0: one", type=int),
)
_FLUSH_TIMEOUT_S = 20.0  # for the last uploads of a run that was asked to stop
_GRACE_S = 60.0  # between torchrun's end and that of a rank which cannot stop by itself
_RESULTS_TIMEOUT_S = 3600.0  # how long the other ranks wait while rank 0 writes the results
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
WEIGHTS = "weights.json"  # in a run: where its initial weights came from
_logger = get_logger("xrai.train")


def main() -> None:
    """Read the command line, join the job, and do this rank's part of it."""
    parsed = parse("train", description="Train a network on a data set.", flags=FLAGS)
    config, flags, _ = parsed
    if flags["resume"] not in ("auto", "must", "never", "changed"):
        raise ConfigError(
            f"--resume = {flags['resume']!r} is not allowed: it takes auto, must, never or changed"
        )
    loop.profile_steps(config.train.profile)
    place = own_place()
    setup_logging(rank=place.rank)
    if not flags["check"]:  # which one task may do before the others start
        refuse_lone_tasks(place)
    stop = StopRequest()
    if place.is_torchrun:
        follow_parent(grace_s=_GRACE_S)
    with join(timeout_s=config.train.timeout_s) as ranks:
        torch.set_num_threads(config.train.threads or default_threads(place))
        if ranks.device.type == "cpu":
            keep_freed_memory()
        with ranks.explaining(), loop.explaining_memory(config.train, world_size=ranks.world_size):
            train(parsed, ranks=ranks, asked_to_stop=stop.is_set)


def train(parsed: Parsed, *, ranks: Ranks, asked_to_stop: Callable[[], bool]) -> None:
    """One rank's part of the job. Raises `UserError` before any work."""
    began = time.monotonic()
    config, flags, given = parsed
    refuse_other_ranks(settings_of(config, flags), ranks=ranks)
    loaders = open_loaders(config, flags["dataset"], ranks=ranks)
    index = loaders["train"].index
    refuse_other_ranks({"data set fingerprint": index.fingerprint}, ranks=ranks)
    num_ranks = max(1, flags["check_ranks"]) if flags["check"] else ranks.world_size
    config = fit_to_dataset(config, index, given=given, num_ranks=num_ranks)
    if flags["init_from"]:
        config = as_begun_with_weights(config)
    check_places(config, flags, index, ranks=ranks)
    plan = describe(config, index, device=ranks.device, num_ranks=num_ranks)
    if flags["check"]:
        check_run(config, flags, loaders, ranks=ranks)
        _logger.info("all checks passed: %s", plan)
        return
    run_id = flags["run_id"] or ranks.from_main(new_run_id(datetime.now(UTC)))
    with open_job(config, flags, run_id, loaders, ranks=ranks) as job:
        on_job = functools.partial(call_on_main, job, ranks=ranks)
        is_finished = on_job(lambda job: job.is_finished(resume=flags["resume"]))
        unlike = None if is_finished else read_unlike(config, flags["dataset"], index, ranks=ranks)
        resumed = None if is_finished else on_job(lambda job: job.open(resume=flags["resume"]))
        if flags["init_from"] and ranks.is_main:
            warn_of_unused_weights(run_id, is_finished=is_finished, is_resumed=resumed is not None)
        if is_finished:
            return
        network = make_network(config, index)
        if resumed is None and (flags["init_from"] or config.model.weights):
            weights = on_job(lambda job: initial_state(job, flags["init_from"], network))
            network.load_state_dict(weights)
        _logger.info("run %s: %s", run_id, plan)
        setup = loop.Setup(
            config,
            ranks,
            loaders["train"],
            loaders["val"],
            labels=index.labels,
            counts=label_counts(index),
            val_labels=loaders["val"].labels,
            name_of=functools.partial(source_of, loaders["train"]),
            after_epoch=job.after_epoch if job else None,
            checkpoints=job.checkpoints if job else None,
            facts=job.facts if job else {},
            resumed=resumed,
            asked_to_stop=asked_to_stop,
            profile_path=job.run.path / "profile.json" if job else None,
        )
        setup_s = time.monotonic() - began
        done = loop.fit(network, setup)
        began = time.monotonic() - setup_s - done.train_s  # as if one process had trained it all
        best = on_job(lambda job: job.best())
        trained = score(best, config, loaders, ranks=ranks, unlike=unlike)
        # All ranks stay to the end: if rank 0 were lost after they had left, torchrun could not
        # start it again alone
        ranks.set_timeout(_RESULTS_TIMEOUT_S)
        lines = on_job(lambda job: job.conclude(trained, began=began))
        if ranks.is_main:
            print("\n".join(lines), flush=True)


@contextmanager
def open_job(
    config: Config, flags: dict[str, Any], run_id: str, loaders: dict[str, Loader], *, ranks: Ranks
) -> Iterator["Job | None"]:
    """The run's folder and everything written into it, on rank 0; None on the others.

    They do not import `xrai.run`, which brings the packages that measure and draw.
    """
    if not ranks.is_main:
        yield None
        return
    from xrai.run import Job

    run = RunFolder(flags["artifacts"], run_id)
    with closing(run):
        try:
            yield Job(config, flags["dataset"], run, loaders, ranks=ranks)
        finally:
            run.flush(timeout_s=_FLUSH_TIMEOUT_S)


def call_on_main(job: "Job | None", work: Callable[["Job"], T], *, ranks: Ranks) -> T:
    """Rank 0's result of `work` on its job, on every rank."""

    def call() -> T:
        assert job is not None
        return work(job)

    return ranks.on_main(call)


def read_unlike(
    config: Config, dataset: str, index: DatasetIndex, *, ranks: Ranks
) -> Unlike | None:
    """The images that `review.unlike` names, read by rank 0; None where it names none.

    Raises `UserError` where the data set was made with one of them.
    """
    source = config.review.unlike
    if not source:
        return None
    from xrai.ingest import unlike  # here: it loads what decodes images

    def read() -> Unlike:
        found = unlike.read_unlike(source, config.images)
        unlike.refuse_shared(found, open_store(dataset), index)
        return found

    return ranks.on_main(read)


def settings_of(config: Config, flags: dict[str, Any]) -> dict[str, object]:
    """The settings that must be equal on all ranks, without those that may differ by machine.

    The place for results is left out, since rank 0 alone uses it, and so is the address of the data
    set, which is compared by its fingerprint.
    """
    settings = {name: flags[name] for name in ("run_id", "resume", "init_from", "check")}
    for section, keys in config.to_mapping().items():
        settings |= {f"{section}.{key}": value for key, value in keys.items()}
    return {
        name: value
        for name, value in settings.items()
        if name != "train.threads" and not name.startswith("cache.")
    }


def refuse_other_ranks(settings: Mapping[str, object], *, ranks: Ranks) -> None:
    """Raise `UserError` on every rank where one has other settings than rank 0."""
    digest = hashlib.sha256(repr(settings).encode(errors="surrogatepass")).digest()
    if len(set(ranks.gather(digest))) == 1:
        return
    first, *others = ranks.gather(settings)
    for rank, own in enumerate(others, start=1):
        for name, value in first.items():
            if own.get(name) != value:
                raise UserError(
                    f"rank {rank} was started with {name} = {masked(str(own.get(name)))}, rank 0 "
                    f"with {masked(str(value))}: start all ranks with the same command"
                )


def score(
    best: tuple[int, Any],
    config: Config,
    loaders: dict[str, Loader],
    *,
    ranks: Ranks,
    unlike: Unlike | None,
) -> Trained:
    """Score the images held out with the weights of the best epoch."""
    epoch, weights = best
    num_outputs = loaders["train"].index.labels.num_outputs
    network = build_model(config.model, num_outputs, image_size=config.images.size)
    load_weights(network, weights)
    network.to(device=ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    train, val = loaders["train"], loaders["val"]
    typicality = fit_typicality(network, train, val, ranks=ranks, unlike=unlike)
    predict = functools.partial(predict_split, network, ranks=ranks, typicality=typicality)
    scored = {split: predict(loaders[split]) for split in loaders if split != "train"}
    draws = config.evaluate.shift_draws
    shifted = predict(loaders["val"], shift=config.augment, draws=draws)
    num_review = 0 if unlike is None else count_review(network, typicality, unlike, ranks=ranks)
    return Trained(network, epoch, typicality, scored, shifted, unlike, num_review)


def default_threads(place: Place) -> int:
    """This rank's share of the cores, or OMP_NUM_THREADS if that is less. Under torchrun, 1 counts
    as unset, because torchrun sets it by default.
    """
    share = max(1, num_cores() // place.local_world_size)
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if not asked.isdecimal() or int(asked) == 0 or (place.is_torchrun and asked == "1"):
        return share
    return min(share, int(asked))


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones. It returns large blocks to the
    kernel, which zeroes them page by page when the next step asks again. Other C libraries decide
    for themselves.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # no limit: the largest, 2 GiB, is less than a step frees


def refuse_lone_tasks(place: Place) -> None:
    """Raise `UserError` where Slurm starts several tasks and each would train the run alone."""
    num_tasks = os.environ.get("SLURM_NTASKS", "1")
    if place.world_size == 1 and not place.is_torchrun and num_tasks not in ("", "0", "1"):
        raise UserError(
            f"SLURM_NTASKS = {num_tasks}, but WORLD_SIZE is not set: each task would train the "
            "same run by itself; start one task a node, each with torchrun (srun "
            "--ntasks-per-node=1 torchrun --nnodes=… -m xrai.train), or unset SLURM_NTASKS to "
            "train with one process"
        )


def check_places(
    config: Config, flags: dict[str, Any], index: DatasetIndex, *, ranks: Ranks
) -> None:
    """Raise `UserError` where the machine, data set or place for results is not usable."""
    if config.train.compile:
        require_compiler(ranks.device)
    if flags["check"]:
        refuse_missing_devices(flags["check_local_ranks"])
    ranks.on_main(lambda: check_dataset(flags["dataset"], index, with_rows=flags["check"]))
    ranks.on_main(lambda: RunFolder.check_writable(flags["artifacts"]))
    if flags["check"]:
        ranks.on_main(lambda: check_disk(config, index, flags))


def warn_of_unused_weights(run_id: str, *, is_finished: bool, is_resumed: bool) -> None:
    """Warn where --init_from has no effect: the run is finished, or resumed."""
    if is_finished or is_resumed:
        why = "is finished" if is_finished else "goes on with its own weights"
        _logger.warning("--init_from is not used: run %s %s", run_id, why)


def require_compiler(device: torch.device) -> None:
    """Raise `UserError` where torch.compile would not find the compiler that it needs: for C++ on a
    CPU; on a GPU Triton needs one for C.
    """
    is_cuda = device.type == "cuda"
    variable, language = ("CC", "C") if is_cuda else ("CXX", "C++")
    own = os.environ.get(variable)
    wanted = [own] if own else ["gcc", "clang"] if is_cuda else ["g++"]
    if not any(map(shutil.which, wanted)):
        raise UserError(
            f"train.compile needs a compiler for {language} ({' or '.join(wanted)}), not found "
            f"here: install one, name it in {variable}, or leave train.compile off"
        )


class StopRequest:
    """Set by the first SIGTERM or SIGINT; a second SIGINT ends the process as usual.

    A second SIGTERM does not: as soon as one rank has left, torchrun sends SIGTERM to the others,
    and those that were asked before it would end with files half uploaded and nothing said.
    """

    def __init__(self) -> None:
        self._asked = False
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, self._note)

    def is_set(self) -> bool:
        """Whether the process was asked to stop."""
        return self._asked

    def _note(self, kind: int, frame: FrameType | None) -> None:
        self._asked = True
        if kind == signal.SIGINT:
            signal.signal(kind, signal.SIG_DFL)


def open_loaders(config: Config, dataset: str, *, ranks: Ranks) -> dict[str, Loader]:
    """The loaders of train (shuffled), val and, if the data set has one, test."""
    open_share = functools.partial(
        open_split, config, dataset, rank=ranks.rank, world_size=ranks.world_size
    )
    train = open_share("train", shuffle=True)
    held_out = [split for split in ("val", "test") if split == "val" or split in train.index.splits]
    return {"train": train, **{split: open_share(split) for split in held_out}}


def fit_to_dataset(
    config: Config, index: DatasetIndex, *, given: Set[str], num_ranks: int
) -> Config:
    """The config with the data set's own sections: its labels, images, splits and shards.

    Raises `UserError` if what was given, or the number of ranks, does not fit the data set.
    """
    stored = Images(**index.config["images"])
    for key, value in dataclasses.asdict(config.images).items():
        if f"images.{key}" in given and value != getattr(stored, key):
            raise DatasetError(
                f"images.{key} = {value!r}, but the data set was made with "
                f"{getattr(stored, key)!r}: leave the key out, or run xrai preprocess again with it"
            )
    num_images = index.num_images("train")
    if num_images < num_ranks:
        raise UserError(
            f"{num_ranks} processes, but only {num_images} training images: each process "
            "needs at least one"
        )
    refuse_one_sided(index)
    loop.rank_batch_size(config.train, world_size=num_ranks)
    config = config.shaped_by(index.config)
    refuse_idle_rank(config, num_images=num_images, num_ranks=num_ranks)
    return config


def make_network(config: Config, index: DatasetIndex) -> Network:
    """The network to train, with the weights that the seed draws."""
    torch.manual_seed(config.train.seed)
    return build_model(config.model, index.labels.num_outputs, image_size=config.images.size)


def source_of(loader: Loader, row: int) -> str:
    """The path, in the source, of the image in a row of a split."""
    return str(loader.columns("source", start=row, stop=row + 1)["source"][0])


def refuse_idle_rank(config: Config, *, num_images: int, num_ranks: int) -> None:
    """Raise `UserError` where the last batch of an epoch leaves a rank without images, and the
    network fails without images, as Swin and MobileViT of timm do.
    """
    num_last = num_images % config.train.global_batch_size
    if not 0 < num_last < num_ranks:
        return
    network = build_model(config.model, 1, image_size=config.images.size).eval()
    try:
        with torch.no_grad():
            network(torch.zeros(0, 1, config.images.size, config.images.size))
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the last batch of an epoch has {counted(num_last, 'image')} for {num_ranks} "
            f"processes, and model.name = {config.model.name} cannot be trained by a process "
            "without images: choose another train.global_batch_size, or fewer processes"
        ) from error


def refuse_one_sided(index: DatasetIndex) -> None:
    """Raise `DatasetError` for a class or finding that cannot be learned or measured."""
    for split, words in (("train", "training"), ("val", "validation")):
        if index.labels.task == "binary":
            if min(index.num_images_per_class(split).values()) == 0:
                raise DatasetError(
                    f"the {words} split has {index.num_images_per_class(split)}: both classes are "
                    "needed"
                )
            continue
        known = index.num_known_per_class(split)
        for name, num in index.num_images_per_class(split).items():
            if not 0 < num < known[name]:
                raise DatasetError(
                    f"the {words} split has {num} images with {name}, of {known[name]} for which "
                    "this is known: both images with it and without it are needed; leave it out, "
                    "or run xrai preprocess again with another division of the patients"
                )


def label_counts(index: DatasetIndex) -> Counts:
    """Images of the training split that show each output, and those where it is known."""
    present, known = index.num_images_per_class("train"), index.num_known_per_class("train")
    counts = tuple(zip(present.values(), known.values(), strict=True))
    return counts[-index.labels.num_outputs :]  # of two classes, the second


def initial_state(job: "Job", init_from: str, network: Network) -> dict[str, torch.Tensor]:
    """The state of a network that begins with the weights of a finished run or of `model.weights`;
    where the latter came from is kept with the run.
    """
    config = job.config
    if init_from:
        if config.model.weights:
            raise ConfigError("--init_from and model.weights both give initial weights: give one")
        return first_weights(init_from, config, network, job.labels)
    state, loaded = initial_weights(config.model, network, image_size=config.images.size)
    job.run.write_json(WEIGHTS, dataclasses.asdict(loaded))
    return state


def as_begun_with_weights(config: Config) -> Config:
    """The config of a run whose weights come from another one: `model.batch_norm = auto` means
    frozen for a timm network, as it does with `model.weights`.
    """
    model = config.model
    if not model.name.startswith(TIMM) or model.batch_norm != "auto":
        return config
    return dataclasses.replace(config, model=dataclasses.replace(model, batch_norm="frozen"))


def first_weights(
    address: str, config: Config, network: Network, labels: LabelSpec
) -> dict[str, torch.Tensor]:
    """The weights of a finished run, for the network of this config.

    The head of a run with other labels is left out: the network's own stays as it is.
    """
    from xrai.pipeline import open_run  # here: it loads what decodes images

    model = open_run(address)
    weights, own = model.network.state_dict(), network.state_dict()
    head = [name for name in own if name.startswith(network.head_prefixes())]
    if model.labels != labels:
        _logger.info(
            "--init_from %s was trained on %s: its head is left out", address, model.labels
        )
        weights |= {name: own[name] for name in head}
    for name in {**own, **weights}:
        if not (name in own and name in weights and weights[name].shape == own[name].shape):
            raise RunError(
                f"--init_from {address} holds another network: {name} does not fit model.name = "
                f"{config.model.name}, model.width = {config.model.width}"
            )
    return weights


def check_dataset(dataset: str, index: DatasetIndex, *, with_rows: bool) -> None:
    """Raise `DatasetError` if the data set is damaged, as far as can be seen before reading it."""
    if faults := find_faults_soon(open_store(dataset), index, with_rows=with_rows):
        raise DatasetError(
            f"data set {dataset} is damaged: {faults[0].key} {faults[0].words}; xrai verify lists "
            "all faults"
        )


def check_run(
    config: Config, flags: dict[str, Any], loaders: dict[str, Loader], *, ranks: Ranks
) -> None:
    """Raise `RunError` where the named run cannot resume with this config, or ended with another
    one, and `UserError` where review cannot be fitted to `review.unlike`.

    Without a name there is nothing to compare with. Another job may write the run meanwhile.
    """
    if flags["run_id"]:
        with open_job(config, flags, flags["run_id"], loaders, ranks=ranks) as job:
            if call_on_main(job, lambda job: job.check(resume=flags["resume"]), ranks=ranks):
                return
    read_unlike(config, flags["dataset"], loaders["train"].index, ranks=ranks)


def check_disk(config: Config, index: DatasetIndex, flags: dict[str, Any]) -> None:
    """Raise `UserError` if the disk has no room for the cache of a remote data set."""
    if open_store(flags["dataset"]).local_path("dataset.json") is not None:
        return
    needed = sum(shard.size_bytes for shards in index.splits.values() for shard in shards)
    if config.cache.max_gib:
        needed = min(needed, int(config.cache.max_gib * 2**30))
    folder = disk_path(config.cache.dir, flag="cache.dir") if config.cache.dir else cache_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the cache needs {needed / 2**30:.2f} GiB and {folder} has {free / 2**30:.2f} GiB "
            "free: set cache.dir to another disk, or cache.max_gib to a smaller size"
        )


def describe(config: Config, index: DatasetIndex, *, device: torch.device, num_ranks: int) -> str:
    """One line about the network, the data and the devices."""
    counts = index.num_images_per_class("train")
    share = loop.rank_batch_size(config.train, world_size=num_ranks)
    return (
        f"{config.model.name} on {index.num_images('train')} images ("
        + ", ".join(map("{} {}".format, counts.values(), index.labels.spoken))
        + f") of {index.image_size} x {index.image_size} pixels, "
        f"{counted(config.train.epochs, 'epoch')}, batches of "
        f"{config.train.global_batch_size} = {num_ranks} x {share}, "
        f"{loop.resolve_precision(config.train.precision, device)} on {device.type}, "
        f"{counted(torch.get_num_threads(), 'thread')} a rank"
    )


if __name__ == "__main__":
    place = own_place()
    run_command(record_failures(main), rank=place.rank, world_size=place.world_size)
