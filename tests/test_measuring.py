"""What a page is told of a data set."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.models import phantoms
from tests.training import Finished, call_main
from xrai import preprocess
from xrai.config import Labels
from xrai.dataset.shards import read_index
from xrai.measuring import describe_dataset
from xrai.store import open_store


def test_a_page_is_told_how_the_labels_of_a_data_set_were_read(finished: Finished) -> None:
    index = read_index(open_store(str(finished.dataset)))
    assert describe_dataset(str(finished.dataset), index).reading == Labels()
    said = {**index.config, "labels": {"layout": "chexpert", "uncertain": "positive"}}
    facts = describe_dataset(str(finished.dataset), replace(index, config=said))
    assert facts.reading == Labels(layout="chexpert", uncertain="positive")
    assert facts.task == "binary"


def test_a_page_is_told_how_many_images_have_no_known_patient(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, dataset = tmp_path / "source", tmp_path / "dataset"
    for number, (film, label) in enumerate(zip(*phantoms(40), strict=True)):
        folder = source / ("NORMAL", "PNEUMONIA")[label]
        folder.mkdir(parents=True, exist_ok=True)
        name = f"person{number}_virus_1.png" if label and number % 2 else f"x{number}.png"
        Image.fromarray(film).save(folder / name)
    options = [f"--source={source}", f"--dataset={dataset}", "--images.size=32", "--workers=1"]
    assert call_main(preprocess, *options, capsys=capsys)[0] == 0
    facts = describe_dataset(str(dataset), read_index(open_store(str(dataset))))
    num_named = len(list(source.glob("*/person*")))
    assert 0 < num_named < 40
    assert sum(facts.num_without_patient.values()) == 40 - num_named
    assert sum(facts.num_patients.values()) == 40
    assert facts.has_patients
