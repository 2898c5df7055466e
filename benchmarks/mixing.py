"""How well the window shuffle mixes, beside a full shuffle. The numbers stand in
docs/decisions/0004.

    python benchmarks/mixing.py  # statistics of the order alone, 100,000 rows in 98 shards
    python benchmarks/mixing.py --dataset data/set  # and gradient descent on a data set's images

Each figure of the first table is divided by what a full shuffle gives, so that 1 is as good as it
gets:
  classes     standard deviation of the share of a class in a batch, rows in hash order, as ours are
  sorted      the same with rows sorted by class, as no data set of ours: what the hash order buys
  again       pairs of images that share a batch in two epochs that follow each other
  moved       mean distance between an image's places in two epochs that follow each other
  shards      different shards in a batch
"""

import argparse
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from xrai.dataset.loader import Loader
from xrai.dataset.order import EpochOrder

BATCH_SIZE = 64
NUM_EPOCHS = 20

Rows = NDArray[np.int64]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description="Mixing of the window shuffle beside a full shuffle."
    )
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the made-up split")
    parser.add_argument("--shard-rows", type=int, default=1024, help="rows of a shard")
    parser.add_argument("--dataset", help="address of a data set to train on")
    parser.add_argument("--seeds", type=int, default=10, help="orders to train with")
    flags = parser.parse_args()
    shard_rows = cut(flags.rows, flags.shard_rows)
    print_statistics(shard_rows)
    if flags.dataset:
        print_descent(flags.dataset, num_seeds=flags.seeds)


def cut(num_rows: int, shard_rows: int) -> list[int]:
    """Rows of each shard."""
    return [min(shard_rows, num_rows - start) for start in range(0, num_rows, shard_rows)]


def window_order(shard_rows: list[int], *, epoch: int, window: int, seed: int = 0) -> Rows:
    """The rows of an epoch as the loader visits them."""
    return EpochOrder(shard_rows, seed=seed, epoch=epoch, window=window, shuffle=True).rows(
        0, sum(shard_rows)
    )


def full_order(num_rows: int, *, epoch: int, seed: int = 0) -> Rows:
    """The rows of an epoch in a full shuffle."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


# -------------------------------------------------------------------------- statistics of the order


def print_statistics(shard_rows: list[int]) -> None:
    num_rows = sum(shard_rows)
    names = ("classes", "sorted", "again", "moved", "shards")
    full = measure([full_order(num_rows, epoch=epoch) for epoch in range(NUM_EPOCHS)], shard_rows)
    print(
        f"{num_rows} rows in {len(shard_rows)} shards, batches of {BATCH_SIZE}, {NUM_EPOCHS} epochs"
    )
    print(f"{'window':>8}", *(f"{name:>8}" for name in names))
    for window in (1, 2, 4, 8, 16, 32, 64, 128):
        if window // 2 >= len(shard_rows):
            break
        orders = [
            window_order(shard_rows, epoch=epoch, window=window) for epoch in range(NUM_EPOCHS)
        ]
        found = measure(orders, shard_rows)
        print(
            f"{window:>8}",
            *(f"{value / best:>8.3f}" for value, best in zip(found, full, strict=True)),
        )
    print(f"{'full':>8}", *(f"{value:>8.4f}" for value in full), "(as measured)")


def measure(orders: list[Rows], shard_rows: list[int]) -> tuple[float, ...]:
    """The figures of the first lines of this file, not yet divided."""
    num_rows = sum(shard_rows)
    hashed = np.random.default_rng(0).random(num_rows) < 0.7  # of which class a row is
    by_class = np.sort(hashed)
    shard_of = np.repeat(np.arange(len(shard_rows)), shard_rows)
    batches = [
        order[: num_rows // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE) for order in orders
    ]
    places = [np.argsort(order) for order in orders]
    return (
        float(np.mean([hashed[rows].mean(axis=1).std() for rows in batches])),
        float(np.mean([by_class[rows].mean(axis=1).std() for rows in batches])),
        float(np.mean([count_pairs_again(first, second) for first, second in pairwise(places)])),
        float(
            np.mean(
                [np.abs(second - first).mean() / num_rows for first, second in pairwise(places)]
            )
        ),
        float(
            np.mean(
                [np.mean([len(np.unique(part)) for part in shard_of[rows]]) for rows in batches]
            )
        ),
    )


def count_pairs_again(first: Rows, second: Rows) -> float:
    """Pairs that share a batch in both epochs, a batch. Both are (N,) places of the rows."""
    together = np.stack([first // BATCH_SIZE, second // BATCH_SIZE])
    _, counts = np.unique(together, axis=1, return_counts=True)
    return float((counts * (counts - 1) / 2).sum() / (len(first) / BATCH_SIZE))


# --------------------------------------------------------------------------------- gradient descent


def print_descent(address: str, *, num_seeds: int) -> None:
    """Logistic regression on small images, three epochs: the mean loss on the held-out split
    after each order.
    """
    train, labels = read_small(address, "train")
    val, val_labels = read_small(address, "val")
    by_class = np.argsort(labels, kind="stable")
    shard_rows = cut(len(labels), 64)
    print(
        f"\nlogistic regression on {len(labels)} images in {len(shard_rows)} shards, "
        f"{num_seeds} orders each"
    )
    print(f"{'order':>22} {'val loss':>9} {'sd':>7}")
    for name, window, rows in (
        ("full", 0, None),
        *((f"window {window}", window, None) for window in (1, 4, 16, 64)),
        *((f"sorted, window {window}", window, by_class) for window in (1, 4, 16, 64)),
    ):
        losses = []
        for seed in range(num_seeds):
            orders = [
                window_order(shard_rows, epoch=epoch, window=window, seed=seed)
                if window
                else full_order(len(labels), epoch=epoch, seed=seed)
                for epoch in range(3)
            ]
            order = np.concatenate(orders)
            weights = descend(train, labels, order if rows is None else rows[order])
            losses.append(mean_loss(val @ weights, val_labels))
        print(f"{name:>22} {np.mean(losses):9.4f} {np.std(losses, ddof=1):7.4f}")


def read_small(address: str, split: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Images (N, 257) averaged to 16 x 16, standardised one by one, with a constant; labels
    (N,).
    """
    images, labels = [], []
    for batch in Loader(address, split=split, batch_size=512).epoch(0):
        n, _, height, width = batch.images.shape
        small = (
            batch.images.reshape(n, 16, height // 16, 16, width // 16)
            .mean(axis=(2, 4))
            .reshape(n, 256)
        )
        small -= small.mean(axis=1, keepdims=True)
        images.append(small / (small.std(axis=1, keepdims=True) + 1e-6))
        labels.append(batch.labels)
    pixels = np.concatenate(images)
    return np.hstack([pixels, np.ones((len(pixels), 1))]), np.concatenate(labels).astype(np.float64)


def descend(
    images: NDArray[np.float64], labels: NDArray[np.float64], order: Rows
) -> NDArray[np.float64]:
    weights = np.zeros(images.shape[1])
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        errors = 1 / (1 + np.exp(-images[rows] @ weights)) - labels[rows]
        weights -= 0.02 * (errors @ images[rows]) / len(rows)
    return weights


def mean_loss(logits: NDArray[np.float64], labels: NDArray[np.float64]) -> float:
    return float(np.mean(np.logaddexp(0, logits) - labels * logits))


if __name__ == "__main__":
    main()
