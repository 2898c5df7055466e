"""Which place in a job a process takes from its environment."""

import pytest

from xrai.learning.distributed import Place, own_place

TOLD = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}


def place(variables: dict[str, str]) -> Place:
    with pytest.MonkeyPatch.context() as patch:
        for name in TOLD:
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        return own_place()


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in TOLD.items() if name not in names}


def test_a_process_that_is_told_all_of_its_place_takes_it() -> None:
    assert place(TOLD) == Place(3, 4, 1, 2, is_torchrun=True)
    assert place(without("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "LOCAL_WORLD_SIZE")) == Place(3, 4)
    assert place(without("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE")) == Place(3, 4, 1, 1)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"TORCHELASTIC_RUN_ID": "none"},
        *(without(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")),
        {**TOLD, "WORLD_SIZE": "many"},
        {**TOLD, "RANK": "-1"},
        {**TOLD, "RANK": "4"},
        {**TOLD, "LOCAL_RANK": "2"},
    ],
    ids=str,
)
def test_a_process_that_is_told_less_is_no_rank(variables: dict[str, str]) -> None:
    assert place(variables) == Place()
