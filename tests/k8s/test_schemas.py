"""Every manifest against the published schemas: those of Kubernetes, and of the custom resources
in overlays.
"""

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml

from tests.k8s.manifests import OVERLAYS, Document, render, stand_alone


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


OLDEST = "1.29"  # the first in which podFailurePolicy and podReplacementPolicy are on by default
VERSIONS = sorted(
    {v for v in kubernetes_validate.utils.all_versions() if _number(v) >= _number(OLDEST)},
    key=_number,
)
CUSTOM = {
    "jobset": {"JobSet"},
    "kueue": {"ResourceFlavor", "ClusterQueue", "LocalQueue"},
    "trainjob": {"TrainJob", "TrainingRuntime"},
}


def is_custom(document: Document) -> bool:
    return document["kind"] in set().union(*CUSTOM.values())


def problems(document: Document, version: str) -> str | None:
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        name = f"{document['kind']}/{document['metadata']['name']}"
        return f"{name} in {version}: {list(error.path)}: {error.message}"
    return None


def test_the_schemas_reach_from_the_oldest_supported_kubernetes_to_a_recent_one() -> None:
    assert VERSIONS[0].startswith(OLDEST) and len(VERSIONS) >= 6


@pytest.fixture(scope="module", autouse=True)
def _schemas_read_once() -> Iterator[None]:
    """kubernetes-validate reads a megabyte of JSON for each document."""
    with pytest.MonkeyPatch.context() as patch:
        read = kubernetes_validate.utils.schema_contents
        patch.setattr(kubernetes_validate.utils, "schema_contents", functools.cache(read))
        yield


@pytest.mark.parametrize("version", VERSIONS)
def test_the_files_that_stand_alone_fit_the_schemas(version: str) -> None:
    assert [problem for document in stand_alone() if (problem := problems(document, version))] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_every_document_of_every_overlay_fits_the_schemas(version: str) -> None:
    rendered = [
        document for overlay in OVERLAYS for document in render(overlay) if not is_custom(document)
    ]
    different = {json.dumps(document, sort_keys=True): document for document in rendered}
    assert len(different) > 20
    assert [
        problem for document in different.values() if (problem := problems(document, version))
    ] == []


@pytest.mark.parametrize("key", ["completion", "podFailurePolicies"])
def test_a_key_that_kubernetes_does_not_know_is_found(key: str) -> None:
    (job,) = (
        d for d in stand_alone() if d["metadata"]["name"] == "xrai-train" and d["kind"] == "Job"
    )
    job["spec"][key] = 2
    assert all(problems(job, version) for version in VERSIONS)


@functools.cache
def custom_schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """(apiVersion, kind) -> JSON schema, of the definitions in XRAI_TEST_SCHEMAS."""
    if not (folder := os.environ.get("XRAI_TEST_SCHEMAS")):
        pytest.skip("XRAI_TEST_SCHEMAS names a folder of custom resource definitions")
    definitions = [
        yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
        for path in sorted(Path(folder).glob("*.yaml"))
    ]
    assert definitions, f"no custom resource definitions in {folder}"
    return {
        (
            f"{definition['spec']['group']}/{version['name']}",
            definition["spec"]["names"]["kind"],
        ): strict(version["schema"]["openAPIV3Schema"])
        for definition in definitions
        for version in definition["spec"]["versions"]
        if version["served"]
    }


def strict(schema: Any) -> Any:
    """The schema, in which an object has no other keys than those named; and OpenAPI's ways said
    in JSON schema's.
    """
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(part) for key, part in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if (
        isinstance(schema.get("properties"), dict)
        and schema.get("type") == "object"
        and not is_open
    ):
        schema["additionalProperties"] = False
    return schema


def custom_problems(document: Document) -> list[str]:
    schema = dict(custom_schemas()[document["apiVersion"], document["kind"]])
    schema["properties"] = {**schema["properties"], "metadata": {"type": "object"}}
    validator = jsonschema.Draft202012Validator(schema)
    return [
        f"{document['kind']}: {list(error.path)}: {error.message}"
        for error in validator.iter_errors(document)
    ]


@pytest.mark.parametrize("overlay", CUSTOM)
def test_custom_resources_fit_their_definitions(overlay: str) -> None:
    documents = [document for document in render(overlay) if is_custom(document)]
    assert {document["kind"] for document in documents} == CUSTOM[overlay]
    assert [problem for document in documents for problem in custom_problems(document)] == []


@pytest.mark.parametrize(
    ("overlay", "kind", "key"),
    [
        ("jobset", "JobSet", "replicatedJob"),
        ("kueue", "LocalQueue", "queue"),
        ("trainjob", "TrainJob", "numNodes"),
    ],
)
def test_a_key_that_a_definition_does_not_know_is_found(overlay: str, kind: str, key: str) -> None:
    (document,) = (document for document in render(overlay) if document["kind"] == kind)
    document["spec"][key] = 2
    assert custom_problems(document)


def test_the_pods_of_a_jobset_are_checked_too() -> None:
    (document,) = (document for document in render("jobset") if document["kind"] == "JobSet")
    pod = document["spec"]["replicatedJobs"][1]["template"]["spec"]["template"]["spec"]
    pod["containers"][0]["resource"] = {}
    assert custom_problems(document)
