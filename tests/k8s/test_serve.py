"""k8s/serve.yaml by itself: the rules of all manifests, the schemas, and what the server takes."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.k8s import policies
from tests.k8s.manifests import (
    K8S,
    REPOSITORY,
    Document,
    environment_of,
    expand,
    of_kind,
    read_documents,
    render_folder,
)
from tests.k8s.policies import Rule
from tests.k8s.test_schemas import VERSIONS, problems
from xrai.command import parse

OWN_RULES = (
    policies.locked_down,
    policies.no_token,
    policies.no_secrets,
    policies.bounded_resources,
    policies.pinned_images,
    policies.failures_explained,
    policies.mounts_fit,
    policies.dead_machines_left,
    policies.variables_known,
    policies.network_denied,
)


@pytest.fixture
def documents() -> list[Document]:
    return read_documents(K8S / "serve.yaml")


def container_of(documents: list[Document]) -> Document:
    pod = of_kind(documents, "Deployment")["xrai-serve"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    found: Document = container
    return found


@pytest.mark.parametrize("rule", OWN_RULES, ids=lambda rule: rule.__name__)
def test_the_server_keeps_the_rules_of_all_manifests(rule: Rule, documents: list[Document]) -> None:
    assert rule(documents) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_the_server_fits_the_schemas(version: str, documents: list[Document]) -> None:
    assert [problem for document in documents if (problem := problems(document, version))] == []


def test_the_file_needs_no_other(documents: list[Document]) -> None:
    kinds = ["ConfigMap", "ServiceAccount", "Service", "NetworkPolicy", "Deployment"]
    assert [document["kind"] for document in documents] == kinds


def test_service_policy_and_probes_reach_the_port_that_the_server_listens_on(
    documents: list[Document],
) -> None:
    container = container_of(documents)
    (port,) = container["ports"]
    assert f"--port={port['containerPort']}" in container["args"]
    (outside,) = of_kind(documents, "Service")["xrai-serve"]["spec"]["ports"]
    (rule,) = of_kind(documents, "NetworkPolicy")["xrai-serve"]["spec"]["ingress"]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness")}
    found = [outside["targetPort"], rule["ports"][0]["port"]]
    assert [*found, *(probe["port"] for probe in probes.values())] == [port["name"]] * 4
    assert probes["startup"]["path"] == container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert probes["liveness"]["path"] == "/healthz"


def test_the_server_takes_its_arguments_and_ends_before_it_is_killed(
    documents: list[Document],
) -> None:
    serve = pytest.importorskip("xrai.serve")
    container = container_of(documents)
    own = environment_of(container, documents, fields={})
    word, *arguments = [expand(text, own) for text in container["args"]]
    parsed = parse(word, arguments, description="", flags=serve.FLAGS)
    flags: dict[str, Any] = parsed.flags
    serve.check_flags(flags)
    assert parsed.runs == (own["XRAI_RUN"],)
    pod = of_kind(documents, "Deployment")["xrai-serve"]["spec"]["template"]["spec"]
    assert flags["stop_s"] + 20 <= pod["terminationGracePeriodSeconds"]
    assert parsed.config.train.threads <= int(container["resources"]["requests"]["cpu"])


def test_the_token_comes_from_a_secret_alone(documents: list[Document]) -> None:
    serve = pytest.importorskip("xrai.serve")
    container = container_of(documents)
    named = [each["secretRef"]["name"] for each in container["envFrom"] if "secretRef" in each]
    assert "xrai-serve" in named and serve.TOKEN not in str(documents)


def test_a_folder_of_ones_own_as_the_page_shows_it_changes_image_and_run(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs/serve.md").read_text()
    ((name, text),) = re.findall(r"```yaml\n# (\S+)\n(.*?)```", page, re.DOTALL)
    (tmp_path / name).write_text(text)
    shutil.copy(K8S / "serve.yaml", tmp_path)
    documents = render_folder(tmp_path)
    assert {rule.__name__: broken for rule in OWN_RULES if (broken := rule(documents))} == {}
    container = container_of(documents)
    assert container["image"] == "REGISTRY/xrai:0.1.0"
    assert environment_of(container, documents, fields={})["XRAI_RUN"].startswith("s3://our-runs/")


def test_a_server_that_stays_on_a_dead_machine_is_found(documents: list[Document]) -> None:
    pod = of_kind(documents, "Deployment")["xrai-serve"]["spec"]["template"]["spec"]
    del pod["tolerations"]
    assert policies.dead_machines_left(documents)
