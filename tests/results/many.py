"""Scores of several classes or findings, drawn at random, and what is measured of them."""

import dataclasses
import functools

import numpy as np

from xrai.labels import LabelSpec, Task
from xrai.results.measure import measure
from xrai.results.types import Scores, SplitResults, outputs_of

KINDS: list[tuple[Task, int]] = [
    ("multilabel", 2),
    ("multiclass", 3),
    ("multilabel", 14),
    ("multiclass", 20),
    ("multilabel", 20),
]
LONG_NAME = "A finding with a name that is longer than the others"


@functools.cache
def make_many(
    task: Task, num_outputs: int, *, num_images: int = 240
) -> tuple[Scores, SplitResults]:
    """Some outputs are learnt better than others; the last of many findings is never present, so
    it has no AUROC.
    """
    generator = np.random.default_rng(num_outputs)
    shape = num_images, num_outputs
    names = [f"Disease {number}" for number in range(num_outputs)]
    names[1] = LONG_NAME
    spec = LabelSpec(task, tuple(names))
    labels = spec.matrix(np.arange(num_images) % num_outputs)
    if task == "multilabel":
        labels = (generator.random(shape) < 0.3).astype(np.int8)
        labels[generator.random(shape) < 0.1] = -1
        if num_outputs > 2:
            labels[:, -1] = np.minimum(labels[:, -1], 0)
    logits = (labels == 1) * generator.uniform(0.2, 3, num_outputs) + generator.normal(0, 1, shape)
    num = num_outputs if task == "multilabel" else 1
    scores = Scores(
        split="test",
        task=task,
        classes=spec.classes,
        outputs=outputs_of(spec, [1.2] * num, [0.6] * num, "chosen on validation"),
        labels=labels,
        logits=logits,
        patients=[str(row // 2) for row in range(num_images)],
        sources=[f"{row}.png" for row in range(num_images)],
        subtypes=[""] * num_images,
        atypicality=np.linspace(0, 1.1, num_images),
    )
    return scores, measure(scores, num_bootstrap=10)


def rename(results: SplitResults, name: str) -> SplitResults:
    """The results with another name of the first output."""
    first = results.outputs[0]
    renamed = dataclasses.replace(first, output=dataclasses.replace(first.output, name=name))
    return dataclasses.replace(results, outputs=(renamed, *results.outputs[1:]))
