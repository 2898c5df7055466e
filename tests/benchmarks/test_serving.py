"""The load that benchmarks.serving puts on a server, for seconds."""

import contextlib
import json
from pathlib import Path

import pytest

from benchmarks.sending import request_of_several, send_all
from benchmarks.serving import Server, ask, measure_load, metric
from tests.models import save_films, save_run


def test_a_metric_is_read_of_all_its_labels() -> None:
    text = '# TYPE a counter\na{b="c"} 2.0\na{b="d e"} 3.0\nab 7.0\n'
    assert sum(metric(text, "a")) == 5 and sum(metric(text, "ab")) == 7


@pytest.mark.ci
def test_a_request_of_several_films_is_answered_with_as_many_rows(tmp_path: Path) -> None:
    films = [path.read_bytes() for path in sorted(save_films(tmp_path, 6).glob("[0-9]*.png"))]
    requests = [request_of_several(films[:3]), request_of_several(films[3:6])]
    with Server(str(save_run(tmp_path / "runs"))) as server:
        send_all(server.port, requests, 4, clients=2)
        with contextlib.closing(server.connect()) as connection:
            listed = json.loads(ask(connection, "GET", "/v1/films")[1])["films"]
    assert sorted(film["name"] for film in listed) == sorted(f"{n}.jpeg" for n in (0, 1, 2) * 4)


@pytest.mark.ci
def test_clients_that_leave_cost_others_no_film(tmp_path: Path) -> None:
    films = sorted(save_films(tmp_path, 12).glob("[0-9]*.png"))
    listed = tmp_path / "listed"
    listed.write_text("\n".join(map(str, films)))
    found = measure_load(
        scratch=tmp_path,
        run=str(save_run(tmp_path / "runs")),
        listed=str(listed),
        num_films=0,
        clients=4,
        minutes=0.25,
    )
    assert found["films"] > 10 and found["left"] > 1
    assert (found["lost"], found["errors"]) == (0, 0)
