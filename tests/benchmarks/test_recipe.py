"""What the comparison of recipes holds out, how it scores, and what its tables mean."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import recipe
from benchmarks.recipe import AS_THEY_ARE, AUGMENTED, COARSE, RULES, VALIDATION, Scored, Scores
from xrai.dataset.manifest import Row
from xrai.ingest.layout import lay_out


def some_entries() -> Sequence[Row]:
    """Forty patients of each stream, numbered from 100, the even ones with two images."""
    numbers = [(patient, image) for patient in range(100, 140) for image in range(2 - patient % 2)]
    names = [f"NORMAL/IM-{p:04}-{i:04}.jpeg" for p, i in numbers]
    names += [f"NORMAL/NORMAL2-IM-{p:04}-{i:04}.jpeg" for p, i in numbers]
    for germ in ("bacteria", "virus"):
        names += [f"PNEUMONIA/person{p}_{germ}_{i}.jpeg" for p, i in numbers]
    return lay_out(names, source="here").rows


@pytest.mark.parametrize("training", [*recipe.STREAMS, *recipe.BLOCKS, *recipe.FOLDS])
def test_no_patient_is_in_training_and_in_test(training: str) -> None:
    entries = some_entries()
    held_out = {entry.path for entry in recipe.hold_out(entries, training)}
    tested = {entry.patient for entry in entries if entry.path in held_out}
    trained = {entry.patient for entry in entries if entry.path not in held_out}
    assert tested and trained and not tested & trained
    labels = {entry.label for entry in entries if entry.path in held_out}
    assert labels == {0, 1}


def test_streams_blocks_and_folds_hold_out_what_they_say() -> None:
    entries = some_entries()

    def streams(training: str) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for entry in recipe.hold_out(entries, training):
            stream, _, number = entry.patient.partition(":")
            found.setdefault(stream, set()).add(int(number))
        return found

    everyone = set(range(100, 140))
    assert streams("IM+bacteria") == {"NORMAL2": everyone, "virus": everyone}
    assert streams("NORMAL2+bacteria") == {"IM": everyone, "virus": everyone}
    low, high = streams("lowest"), streams("highest")
    assert set(low) == set(high) == {"IM", "NORMAL2", "bacteria", "virus"}
    assert all(own == set(range(100, 110)) for own in low.values())
    assert all(own == set(range(130, 140)) for own in high.values())
    folds = [entry.path for fold in recipe.FOLDS for entry in recipe.hold_out(entries, fold)]
    assert Counter(folds) == Counter(entry.path for entry in entries)


def test_looks_change_what_they_say() -> None:
    normal, pneumonia = some_entries()[0], some_entries()[-1]
    assert (normal.label, pneumonia.label) == (0, 1)
    across = np.tile(np.linspace(0, 255, 100, dtype=np.uint8)[:, None], (1, 80))
    image = Image.fromarray(across)  # brighter from top to bottom
    stretch = recipe.stretch_normals(0.8)
    assert stretch(image, pneumonia) is image
    stretched = np.asarray(stretch(image, normal))
    assert stretched.shape == across.shape
    assert (stretched[0, 0], stretched[-1, 0]) == (
        pytest.approx(25, abs=2),
        pytest.approx(229, abs=2),
    )
    coarse = recipe.make_coarse(image, normal)
    assert coarse.size == (40, 50) and coarse.format == "JPEG"


def some_scores(labels: list[int], logits: list[float]) -> Scores:
    return Scores(np.array(labels), np.array(logits), np.zeros(len(labels), dtype=np.bool_))


def test_accuracy_has_the_mix_of_the_official_test() -> None:
    scores = some_scores([0, 0, 1, 1, 1, 1], [-1, 2, 1, 1, 1, -1])
    found = recipe.measure(scores, 0.0)
    assert (found["sensitivity"], found["specificity"]) == (0.75, 0.5)
    assert found["accuracy"] == pytest.approx(0.75 * 0.625 + 0.5 * 0.375)
    assert recipe.measure(scores, 1.5)["sensitivity"] == 0


def test_each_rule_uses_its_own_images() -> None:
    looks = {
        VALIDATION: some_scores([0, 0, 1, 1], [-9, -8, -2, 5]),
        AUGMENTED: some_scores([0, 0, 0, 0, 1, 1, 1, 1], [-6, -3, -1, 0.5, 1.5, 2, 3, 4]),
    }
    thresholds = {rule: choose(looks) for rule, choose in RULES.items()}
    assert -8 < thresholds["clean"] < thresholds["both"] < thresholds["augmented"] < 1.5
    assert thresholds["logit 0"] == 0


def test_stored_scores_are_read_back(tmp_path: Path) -> None:
    scores = some_scores([0, 1], [-0.1234567890123, 3.0])
    scores = replace(scores, reviews=np.array([True, False]))
    recipe.write_scores(tmp_path / "scores.csv", 12.5, [(AS_THEY_ARE, scores), (COARSE, scores)])
    seconds, looks = recipe.read_scores(tmp_path / "scores.csv")
    assert seconds == 12.5 and list(looks) == [AS_THEY_ARE, COARSE]
    for found in looks.values():
        assert found.logits.tolist() == scores.logits.tolist()
        assert found.labels.tolist() == [0, 1] and found.reviews.tolist() == [True, False]


def test_means_are_over_real_shifts_alone() -> None:
    good, bad = some_scores([0, 1], [-1, 1]), some_scores([0, 1], [1, -1])
    looks = {VALIDATION: good, AUGMENTED: good, AS_THEY_ARE: good, COARSE: bad}
    looks["normals 86 % high"] = bad
    scored = [
        Scored("A", "IM+bacteria", 0, 10.0, looks),
        Scored("A", "fold 0", 0, 20.0, {**looks, AS_THEY_ARE: bad}),
    ]
    assert recipe.over_shifts(scored, "augmented", "auroc") == "0.5000 ± 0.5000"
    (row,) = recipe.show_recipes(scored)[2:]
    assert row.startswith("| A | 0.5000 ± 0.5000 | 0.5000 ± 0.5000 |") and row.endswith("| 15 |")
    assert len(recipe.show_looks(scored)) == 2 + 6
    assert len(recipe.show_rules(scored)) == 2 + len(RULES)


def test_a_recipe_in_the_cache_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    for number, entry in enumerate(some_entries()):
        file = source / entry.path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number % 256, np.uint8)).save(file)
    calls: list[tuple[str, ...]] = []

    def run(module: str, *options: str, processes: int = 0) -> None:
        calls.append((module, *options))
        dataset = next(option for option in options if option.startswith("--dataset="))
        place = Path(dataset.removeprefix("--dataset="))
        place.mkdir(exist_ok=True)
        (place / "dataset.json").write_text(json.dumps({}))

    good = some_scores([0, 1], [-1, 1])
    monkeypatch.setattr(recipe, "run_module", run)
    monkeypatch.setattr(recipe.Bench, "_score", lambda *_: iter([(AS_THEY_ARE, good)]))
    bench = recipe.Bench(str(source), None, tmp_path / "cache", 1)
    config = tmp_path / "own.yaml"
    config.write_text("train: {epochs: 2}")
    options = f"--config={config} --images.size=32 --model.width=24"
    first = bench.scores_of(options, "lowest", 3)
    assert [call[0] for call in calls] == ["xrai.preprocess", "xrai.train"]
    assert {f"--config={config}", "--images.size=32"} < {*calls[0]}
    assert "--model.width=24" not in calls[0]
    assert {"--model.width=24", "--train.seed=3"} < {*calls[1]}
    again = bench.scores_of(options, "lowest", 3)
    assert len(calls) == 2 and again.seconds == first.seconds
    bench.scores_of(options, "lowest", 4)  # another seed: the data set is there
    assert [call[0] for call in calls[2:]] == ["xrai.train"]
    config.write_text("train: {epochs: 3}")
    bench.scores_of(options, "lowest", 3)  # the same name, another recipe
    assert [call[0] for call in calls[3:]] == ["xrai.preprocess", "xrai.train"]
