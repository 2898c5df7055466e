"""What a page is told of a data set."""

from dataclasses import replace

from tests.training import Finished
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
