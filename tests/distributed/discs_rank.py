"""One rank of a training on discs in memory; prints what it came to as one line of JSON. The tests
start it.

python tests/distributed/discs_rank.py [--folder DIR] [--stop_after N] [--poison 1]
[--section.key=value …]
"""

import base64
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.learning.fakes import FakeBatch, FakeLoader, train_discs
from xrai.command import Flag, parse, run_command
from xrai.learning.distributed import join, own_place, record_failures


def main() -> None:
    flags = [
        Flag("folder", "", "where checkpoints are"),
        Flag("task", "binary", "what the labels are: binary, multiclass or multilabel"),
        Flag("stop_after", 0, "ask to stop after so many steps, on one rank", type=int),
        Flag("stop_rank", 0, "which rank is asked to stop", type=int),
        Flag("poison_rank", -1, "the rank whose loss is not finite in the fourth step", type=int),
        Flag("hang_rank", -1, "the rank that hangs before its seventh step", type=int),
        Flag("raise_rank", -1, "the rank that raises before its seventh step", type=int),
        Flag("share_device", False, "all ranks take the first device, over gloo", type=bool),
        Flag("reduce", False, "sum a tensor on the device over all ranks", type=bool),
        Flag("num_images", 150, "training images", type=int),
        Flag("num_val", 41, "validation images", type=int),
    ]
    config, values, _ = parse("train", description="discs", flags=flags)
    torch.set_num_threads(1)
    joined = join(timeout_s=config.train.timeout_s, share_device=values["share_device"])
    with joined as ranks, ranks.explaining():

        def poison(loader: FakeLoader) -> None:
            original = loader.epoch

            def epoch(epoch: int, *, start: int = 0) -> Iterator[FakeBatch]:
                for position, batch in enumerate(original(epoch, start=start)):
                    if epoch == 1 and position == 1 and ranks.rank == values["hang_rank"]:
                        time.sleep(100)
                    if epoch == 1 and position == 1 and ranks.rank == values["raise_rank"]:
                        _ = 1 / 0
                    if position + start == 3 and ranks.rank == values["poison_rank"]:
                        batch.labels = batch.labels.astype(np.float32)
                        batch.labels[[0, 2]] = np.nan
                    yield batch

            loader.epoch = epoch  # type: ignore[method-assign]

        outcome = train_discs(
            config,
            ranks=ranks,
            folder=Path(values["folder"]) if values["folder"] else None,
            num_images=values["num_images"],
            num_val=values["num_val"],
            task=values["task"],
            stop_after=values["stop_after"]
            if ranks.rank == values["stop_rank"] and values["stop_after"]
            else None,
            damage=poison,
        )
        backend = dist.get_backend() if dist.is_initialized() else ""
        reduced = torch.full((), 3.0, device=ranks.device)
        if values["reduce"] and backend:
            dist.all_reduce(reduced)
    print(
        json.dumps(
            {
                "backend": backend,
                "reduced": float(reduced),
                "losses": outcome.losses,
                "weights": {
                    name: base64.b64encode(np.array(values).tobytes()).decode()  # all their bits
                    for name, values in outcome.weights.items()
                },
                "stopped": outcome.stopped,
                "epochs": [
                    {
                        "epoch": result.epoch,
                        "train_loss": result.train_loss,
                        "train_accuracy": result.train_accuracy,
                        "val_loss": result.val_loss,
                        "val_logits": result.val.logits.tolist(),
                        "shifted_logits": result.shifted.logits.tolist(),
                    }
                    for result in outcome.results
                ],
            }
        )
    )


place = own_place()
run_command(record_failures(main), rank=place.rank, world_size=place.world_size)
