"""What is measured in an epoch: a row of history.csv, points in TensorBoard, a line of the log.

A metric is one field of `EpochRow`; everything else follows from the field.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from xrai.errors import RunError


def _metric(
    tag: str, *, log: str = "", title: str = "", of_several: bool = False, may_lack: bool = False
) -> float:
    """A field; `log` is its part of the log line, `title` a column in TensorBoard's run table.

    What `may_lack` a value then has no part of the line. What is `of_several` outputs has no column
    either.
    """
    metadata: dict[str, Any] = {"tag": tag, "log": log, "title": title, "of_several": of_several}
    metadata["may_lack"] = may_lack or of_several
    return field(default=math.nan, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """The metrics of one epoch, in the order of history.csv's columns; NaN is an empty field.

    `epoch` counts from 1, `step` is the last one of the epoch. `shifted` stands for augmented
    validation images, `accelerator_utilisation` is as MLPerf Storage defines it. Of several
    outputs, an AUROC is their macro mean, and `val_auroc_worst` the lowest of them.
    """

    epoch: int
    step: int
    train_loss: float = _metric("loss/train", log="loss {:.4f}")
    train_accuracy: float = _metric("accuracy/train")
    val_loss: float = _metric("loss/val", log="val loss {:.4f}")
    val_accuracy: float = _metric(
        "accuracy/val", log="val accuracy {:.4f}", title="accuracy, validation"
    )
    val_auroc: float = _metric("auroc/val", log="val AUROC {:.4f}")
    val_auroc_worst: float = _metric("auroc/val_worst", log="worst {worst} {:.3f}", of_several=True)
    shifted_accuracy: float = _metric("accuracy/val_shifted")
    shifted_auroc: float = _metric(
        "auroc/val_shifted", log="augmented val AUROC {:.4f}", title="AUROC, augmented validation"
    )
    lr: float = _metric("optim/lr")
    grad_norm: float = _metric("optim/grad_norm")
    images_per_s: float = _metric("throughput/images_per_s", log="{:.0f} images/s", may_lack=True)
    data_wait_share: float = _metric(
        "throughput/data_wait_share", log="{:.1%} of the time waiting for data"
    )
    accelerator_utilisation: float = _metric("throughput/accelerator_utilisation")
    fetch_s: float = _metric("time/fetch_s")
    verify_s: float = _metric("time/verify_s")
    assemble_s: float = _metric("time/assemble_s")
    transfer_s: float = _metric("time/transfer_s")
    compute_s: float = _metric("time/compute_s")
    eval_s: float = _metric("time/eval_s")
    epoch_s: float = _metric("time/epoch_s")
    peak_memory_mib: float = _metric("memory/peak_mib", log="peak memory {:.0f} MiB")

    def line(self, worst: str = "") -> str:
        """The line of the log; `worst` names the output whose AUROC is the lowest."""
        shown = ((column, getattr(self, column.name)) for column in fields(self))
        parts = [
            column.metadata["log"].format(value, worst=worst)
            for column, value in shown
            if column.metadata.get("log")
            and not (column.metadata["may_lack"] and math.isnan(value))
        ]
        return f"epoch {self.epoch}: {', '.join(parts)}"


def columns_of(rows: Sequence[EpochRow]) -> tuple[str, ...]:
    """The columns of history.csv; those of several outputs only where a row has a value."""
    return tuple(
        column.name
        for column in fields(EpochRow)
        if not column.metadata.get("of_several")
        or any(math.isfinite(getattr(row, column.name)) for row in rows)
    )


TAGS = {column.name: str(column.metadata["tag"]) for column in fields(EpochRow) if column.metadata}
TITLES = {  # by tag: the metrics of an epoch in TensorBoard's table of runs
    str(column.metadata["tag"]): str(column.metadata["title"])
    for column in fields(EpochRow)
    if column.metadata.get("title")
}


def parse_history(data: bytes, *, where: str) -> list[EpochRow]:
    """The rows of a history.csv; `where` is its name in the `RunError` of a damaged one."""
    try:
        rows = []
        for cells in csv.DictReader(data.decode().splitlines()):
            epoch, step = int(cells.pop("epoch")), int(cells.pop("step"))
            if not (1 <= epoch < 2**31 and 0 <= step < 2**53):
                raise ValueError(f"epoch {epoch}, step {step}")
            metrics = {name: float(text) if text else math.nan for name, text in cells.items()}
            rows.append(EpochRow(epoch=epoch, step=step, **metrics))
        return rows
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        text = f"{where} is not a history of xrai: {error}; remove it, or start a new run"
        raise RunError(text) from error
