"""Scores of a split, and the file of a finished run: nothing is lost between them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.learning.fakes import DamagingStore, FakeLoader, fit_discs, make_discs
from tests.models import without_detail
from xrai.config import Augment, Images, Model
from xrai.errors import CorruptError, RunError
from xrai.files import sha256_of
from xrai.labels import LabelSpec
from xrai.learning.distributed import Ranks
from xrai.learning.network import Network
from xrai.learning.predictor import MODEL_FILE, TrainedModel, load_model, predict_split, save_model
from xrai.learning.typicality import Typicality
from xrai.store import open_store

ONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def fitted() -> tuple[Network, Typicality]:
    return fit_discs()


@pytest.fixture
def run(fitted: tuple[Network, Typicality], tmp_path: Path) -> Path:
    trained = TrainedModel(
        fitted[0],
        Model(width=8),
        Images(size=32),
        LabelSpec("binary", ("NORMAL", "PNEUMONIA")),
        temperatures=(1.5,),
        thresholds=(0.25,),
        typicality=fitted[1],
        run_id="discs",
        fingerprint="f" * 64,
        priors=(0.3,),
    )
    save_model(tmp_path / MODEL_FILE, trained)
    return tmp_path


def test_a_saved_model_scores_as_it_did(fitted: tuple[Network, Typicality], run: Path) -> None:
    model = load_model(open_store(str(run)))
    assert (model.temperatures, model.thresholds) == ((1.5,), (0.25,))
    assert (model.labels, model.run_id, model.image_size) == (
        LabelSpec("binary", ("NORMAL", "PNEUMONIA")),
        "discs",
        32,
    )
    loader = FakeLoader(*make_discs(20, seed=9), batch_size=8)
    before = predict_split(fitted[0], loader, ranks=ONE, typicality=fitted[1])
    after = predict_split(model.network, loader, ranks=ONE, typicality=model.typicality)
    assert after.logits == pytest.approx(before.logits, abs=1e-5)  # the memory format is another
    assert before.atypicality is not None and after.atypicality is not None
    assert after.atypicality == pytest.approx(before.atypicality, rel=1e-4)


def test_a_model_of_another_version_is_refused(run: Path) -> None:
    content = torch.load(run / MODEL_FILE, weights_only=True)
    torch.save({**content, "schema_version": 1}, run / MODEL_FILE)
    with pytest.raises(RunError, match="schema version 1, this xrai reads versions 3, 4, 5"):
        load_model(open_store(str(run)))


def test_a_model_of_version_4_reviews_by_its_own_rule(run: Path) -> None:
    content = torch.load(run / MODEL_FILE, weights_only=True)
    earlier = without_detail(content["typicality"])
    torch.save({**content, "schema_version": 4, "typicality": earlier}, run / MODEL_FILE)
    model = load_model(open_store(str(run)))
    images = torch.rand(3, 1, 32, 32)
    found, expected = (
        typicality.atypicality(model.network, images)[1]
        for typicality in (model.typicality, Typicality(**earlier))
    )
    assert not model.typicality.has_detail and torch.equal(found, expected)


@pytest.mark.parametrize("version", [4, 5])
def test_a_review_rule_of_another_version_is_refused(run: Path, version: int) -> None:
    content = torch.load(run / MODEL_FILE, weights_only=True)
    if version == 5:
        content["typicality"] = without_detail(content["typicality"])
    torch.save({**content, "schema_version": version}, run / MODEL_FILE)
    with pytest.raises(CorruptError, match=f"review of version {version}"):
        load_model(open_store(str(run)))


def test_a_model_of_version_3_is_read_without_priors(run: Path) -> None:
    content = torch.load(run / MODEL_FILE, weights_only=True)
    assert content.pop("priors") == [0.3] == list(load_model(open_store(str(run))).priors)
    content["typicality"] = without_detail(content["typicality"])
    torch.save({**content, "schema_version": 3}, run / MODEL_FILE)
    model = load_model(open_store(str(run)))
    assert (model.priors, model.thresholds, model.fingerprint) == ((), (0.25,), "f" * 64)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("thresholds", [float("nan")]),
        ("thresholds", ["0.5"]),
        ("thresholds", [0.5, 0.5]),
        ("temperatures", [0.0]),
        ("temperatures", [-1.0]),
        ("temperatures", []),
        ("priors", [0.5, 0.5]),
        ("priors", [0.0]),
        ("priors", [float("nan")]),
        ("priors", None),
        ("classes", 2),
        ("classes", ["NORMAL", "Review"]),
        ("task", "multilabel"),
        ("task", "ternary"),
        ("weights", {}),
        ("model", {"name": "resnet10", "depth": 3}),
        ("images", None),
        ("typicality", {}),
    ],
)
def test_a_model_that_holds_something_else_is_refused(run: Path, key: str, value: object) -> None:
    content = torch.load(run / MODEL_FILE, weights_only=True)
    torch.save({**content, key: value}, run / MODEL_FILE)
    with pytest.raises(CorruptError, match=r"model\.pt of .* does not hold what a run saves"):
        load_model(open_store(str(run)))


def test_a_model_file_with_a_flipped_bit_is_refused_or_unchanged(run: Path) -> None:
    good = (run / MODEL_FILE).read_bytes()
    expected = torch.load(run / MODEL_FILE, weights_only=True)["weights"]
    generator, num_refused = np.random.default_rng(0), 0
    for place in generator.integers(0, len(good), 150).tolist():
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(generator.integers(8))
        (run / MODEL_FILE).write_bytes(damaged)
        try:
            found = load_model(open_store(str(run))).network.state_dict()
        except CorruptError:
            num_refused += 1
        else:  # a bit that means nothing, such as one of a file's date
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert num_refused > 100


def test_a_model_file_cut_anywhere_is_refused(run: Path) -> None:
    good = (run / MODEL_FILE).read_bytes()
    for length in np.random.default_rng(1).integers(0, len(good), 20).tolist():
        (run / MODEL_FILE).write_bytes(good[:length])
        with pytest.raises(CorruptError, match=MODEL_FILE.replace(".", r"\.")):
            load_model(open_store(str(run)))


def test_a_model_that_arrives_damaged_is_fetched_again(run: Path) -> None:
    sha256 = sha256_of(run / MODEL_FILE)
    assert load_model(DamagingStore(run, num_damaged=2), sha256=sha256).run_id == "discs"
    with pytest.raises(CorruptError, match="does not have the hash"):
        load_model(DamagingStore(run, num_damaged=3), sha256=sha256)


@pytest.mark.parametrize("draws", [1, 3])
def test_atypicality_comes_beside_the_same_logits_for_each_draw(
    fitted: tuple[Network, Typicality], draws: int
) -> None:
    network, typicality = fitted
    loader = FakeLoader(*make_discs(21, seed=9), batch_size=8, shuffle=True)
    alone = predict_split(network, loader, ranks=ONE, shift=Augment(), draws=draws)
    both = predict_split(
        network, loader, ranks=ONE, shift=Augment(), draws=draws, typicality=typicality
    )
    assert alone.atypicality is None and both.atypicality is not None
    assert both.logits.shape == (draws, 21, 1) and both.atypicality.shape == (draws, 21)
    assert both.logits == pytest.approx(alone.logits, abs=1e-5)


def test_scores_stand_in_the_order_of_the_rows(fitted: tuple[Network, Typicality]) -> None:
    network, typicality = fitted
    discs = make_discs(21, seed=9)
    plain, shuffled = (
        predict_split(
            network,
            FakeLoader(*discs, batch_size=size, shuffle=size == 8),
            ranks=ONE,
            typicality=typicality,
        )
        for size in (21, 8)
    )
    assert plain.atypicality is not None and shuffled.atypicality is not None
    assert shuffled.atypicality == pytest.approx(plain.atypicality, rel=1e-4)
    assert shuffled.logits == pytest.approx(plain.logits, abs=1e-5)


def test_a_split_is_scored_as_the_network_itself_scores_it_bit_for_bit(
    fitted: tuple[Network, Typicality],
) -> None:
    network, _ = fitted
    loader = FakeLoader(*make_discs(8, seed=5), batch_size=8)
    found = predict_split(network, loader, ranks=ONE)
    batch = next(iter(loader.epoch(0)))
    with torch.inference_mode():
        images = torch.from_numpy(batch.images).float() / 255
        logits = network(images.contiguous(memory_format=torch.channels_last))
    assert np.array_equal(found.logits[0], logits.double().numpy()[np.argsort(batch.rows)])
