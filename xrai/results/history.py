"""history.csv: one row an epoch."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xrai.errors import RunError

HISTORY_COLUMNS = (
    "epoch", "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_auroc", "shifted_accuracy",
    "shifted_auroc", "lr", "grad_norm", "images_per_s", "data_wait_share", "accelerator_utilisation", "fetch_s",
    "verify_s", "assemble_s", "transfer_s", "compute_s", "eval_s", "epoch_s", "peak_memory_mib",
)  # fmt: skip
TENSORBOARD_TAGS = {
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "train_accuracy": "accuracy/train",
    "val_accuracy": "accuracy/val",
    "shifted_accuracy": "accuracy/val_shifted",
    "val_auroc": "auroc/val",
    "shifted_auroc": "auroc/val_shifted",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "images_per_s": "throughput/images_per_s",
    "data_wait_share": "throughput/data_wait_share",
    "accelerator_utilisation": "throughput/accelerator_utilisation",
    "fetch_s": "time/fetch_s",
    "verify_s": "time/verify_s",
    "assemble_s": "time/assemble_s",
    "transfer_s": "time/transfer_s",
    "compute_s": "time/compute_s",
    "eval_s": "time/eval_s",
    "epoch_s": "time/epoch_s",
    "peak_memory_mib": "memory/peak_mib",
}


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows of a history.csv: epoch and step whole numbers, the rest numbers, None where a
    field is empty.
    """
    with path.open(newline="", encoding="utf-8") as file:
        return parse_history(file, where=str(path))


def parse_history(lines: Iterable[str], *, where: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        for fields in csv.DictReader(lines):
            row: dict[str, Any] = {
                key: float(text) if text else None for key, text in fields.items()
            }
            rows.append({**row, "epoch": int(fields["epoch"]), "step": int(fields["step"])})
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{where} is not a history of xrai: {error}; remove it, or start a new run"
        ) from error
    return rows
