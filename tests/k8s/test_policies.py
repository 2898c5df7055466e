"""The manifests keep the rules of tests/k8s/policies.py, and each rule can be broken."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s import policies
from tests.k8s.controllers import Ended, Failure, job_failure, jobset_action
from tests.k8s.manifests import (
    FILES,
    K8S,
    OVERLAYS,
    REPOSITORY,
    Document,
    of_kind,
    read_documents,
    render,
    render_folder,
    requested,
    stand_alone,
    workloads,
)
from tests.k8s.policies import RULES, Rule


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_files_that_stand_alone_keep_the_rule(rule: Rule) -> None:
    assert rule(stand_alone()) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_keeps_all_rules(overlay: str) -> None:
    documents = render(overlay)
    assert {rule.__name__: broken for rule in RULES if (broken := rule(documents))} == {}


TRAIN, PREPROCESS = "Job xrai-train", "Job xrai-preprocess"
TENSORBOARD = "Deployment xrai-tensorboard"
POD, CONTAINER = "spec template spec", "spec template spec containers train"
GONE = object()
UNCOUNTED = "RestartJobSetAndIgnoreMaxRestarts"

# which rule, which document, where in it, what instead
BREAKS: list[tuple[Rule, str, str, Any]] = [
    (policies.locked_down, TRAIN, f"{POD} securityContext runAsNonRoot", GONE),
    (policies.locked_down, TRAIN, f"{POD} securityContext runAsUser", 0),
    (policies.locked_down, TRAIN, f"{POD} securityContext seccompProfile", GONE),
    (policies.locked_down, TRAIN, f"{POD} hostNetwork", True),
    (policies.locked_down, TRAIN, f"{POD} volumes tmp", {"name": "tmp", "hostPath": {"path": "/"}}),
    (policies.locked_down, TRAIN, f"{CONTAINER} securityContext readOnlyRootFilesystem", False),
    (policies.locked_down, TRAIN, f"{CONTAINER} securityContext allowPrivilegeEscalation", GONE),
    (
        policies.locked_down,
        TRAIN,
        f"{CONTAINER} securityContext capabilities",
        {"drop": ["ALL"], "add": ["SYS_ADMIN"]},
    ),
    (policies.locked_down, TRAIN, f"{POD} initContainers wait securityContext", GONE),
    (policies.no_token, TRAIN, f"{POD} serviceAccountName", GONE),
    (policies.no_token, TRAIN, f"{POD} automountServiceAccountToken", True),
    (policies.no_token, "ServiceAccount xrai-train", "automountServiceAccountToken", GONE),
    (policies.no_secrets, "ConfigMap xrai", "data AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI"),
    (
        policies.no_secrets,
        TRAIN,
        f"{CONTAINER} env",
        [{"name": "AWS_ACCESS_KEY_ID", "value": "AKIA"}],
    ),
    (policies.bounded_resources, TRAIN, f"{CONTAINER} resources limits", GONE),
    (policies.bounded_resources, TRAIN, f"{CONTAINER} resources requests memory", "1Gi"),
    (policies.bounded_resources, TRAIN, f"{CONTAINER} resources limits nvidia.com/gpu", 2),
    (policies.bounded_resources, TRAIN, f"{POD} volumes cache emptyDir", {}),
    (policies.pinned_images, TRAIN, f"{CONTAINER} image", "xrai"),
    (policies.pinned_images, TRAIN, f"{CONTAINER} image", "xrai:latest"),
    (policies.pinned_images, TRAIN, f"{CONTAINER} image", "xrai:0.0.9"),
    (policies.failures_explained, TRAIN, f"{CONTAINER} terminationMessagePolicy", GONE),
    (policies.failures_explained, TRAIN, f"{CONTAINER} env XRAI_TERMINATION_LOG", GONE),
    (policies.failures_explained, TRAIN, f"{CONTAINER} terminationMessagePath", "/tmp/message"),
    (
        policies.failures_explained,
        TRAIN,
        f"{CONTAINER} env TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
        {"name": "TORCHELASTIC_ERROR_FILE", "value": "/dev/termination-log"},
    ),
    (policies.mounts_fit, TRAIN, f"{POD} volumes shm", GONE),
    (policies.mounts_fit, TRAIN, f"{POD} volumes shm emptyDir medium", ""),
    (policies.mounts_fit, TRAIN, f"{POD} volumes shm emptyDir sizeLimit", "64Mi"),
    (policies.mounts_fit, TRAIN, f"{CONTAINER} volumeMounts tmp", GONE),
    (policies.mounts_fit, TRAIN, f"{CONTAINER} volumeMounts config readOnly", False),
    (policies.mounts_fit, TRAIN, f"{POD} volumes config configMap name", "elsewhere"),
    (policies.cache_fits_its_volume, TRAIN, f"{POD} volumes cache emptyDir sizeLimit", "16Gi"),
    (
        policies.cache_fits_its_volume,
        "ConfigMap xrai-config",
        "data config.yaml",
        "cache: {max_gib: 0}",
    ),
    (policies.jobs_replace_what_was_lost, TRAIN, "spec podFailurePolicy", GONE),
    (policies.jobs_replace_what_was_lost, TRAIN, "spec podFailurePolicy rules 0 action", "Count"),
    (
        policies.jobs_replace_what_was_lost,
        TRAIN,
        "spec podFailurePolicy rules 1 onExitCodes values",
        [1],
    ),
    (policies.jobs_replace_what_was_lost, PREPROCESS, "spec podFailurePolicy rules 1", GONE),
    (
        policies.jobs_replace_what_was_lost,
        TRAIN,
        "spec podReplacementPolicy",
        "TerminatingOrFailed",
    ),
    (policies.jobs_replace_what_was_lost, TRAIN, "spec ttlSecondsAfterFinished", GONE),
    (policies.jobs_replace_what_was_lost, TRAIN, "spec completionMode", "NonIndexed"),
    (policies.jobs_replace_what_was_lost, TRAIN, f"{POD} restartPolicy", "OnFailure"),
    (policies.jobs_replace_what_was_lost, PREPROCESS, "spec backoffLimitPerIndex", GONE),
    (policies.jobs_replace_what_was_lost, PREPROCESS, "spec backoffLimit", 32),
    (policies.jobs_replace_what_was_lost, TRAIN, "spec backoffLimit", 5),
    (policies.nodes_meet, TRAIN, "spec parallelism", 1),
    (policies.nodes_meet, TRAIN, "spec completions", 3),
    (policies.nodes_meet, TRAIN, f"{CONTAINER} env NUM_NODES value", "3"),
    (policies.nodes_meet, TRAIN, f"{POD} subdomain", GONE),
    (policies.nodes_meet, "Service xrai-train", "spec clusterIP", GONE),
    (policies.nodes_meet, "Service xrai-train", "spec publishNotReadyAddresses", False),
    (policies.nodes_meet, "Service xrai-train", "spec selector", {"app": "xrai"}),
    (
        policies.nodes_meet,
        TRAIN,
        f"{CONTAINER} args 4",
        "--rdzv_endpoint=$(JOB_NAME)-0.xrai-train:29400",
    ),
    (policies.nodes_meet, TRAIN, f"{CONTAINER} args 3", "--rdzv_backend=static"),
    (policies.nodes_meet, TRAIN, f"{CONTAINER} env TORCH_DISABLE_SHARE_RDZV_TCP_STORE", GONE),
    (policies.num_nodes_held, TRAIN, f"{CONTAINER} env NUM_NODES", GONE),
    (policies.num_nodes_held, TRAIN, f"{POD} initContainers preflight env NUM_NODES value", "3"),
    (policies.num_nodes_held, TRAIN, "spec completions", 3),
    (policies.num_nodes_held, TRAIN, f"{CONTAINER} args 5", "--rdzv_id=$(XRAI_RUN_ID)"),
    (policies.dead_machines_left, TRAIN, f"{POD} tolerations", GONE),
    (policies.dead_machines_left, PREPROCESS, f"{POD} tolerations 1 tolerationSeconds", GONE),
    (policies.dead_machines_left, TRAIN, f"{POD} tolerations 0 tolerationSeconds", 300),
    (
        policies.readers_seen,
        TENSORBOARD,
        f"{POD} containers tensorboard readinessProbe",
        {"httpGet": {"path": "/", "port": "http"}},
    ),
    (policies.time_to_save, TRAIN, f"{POD} terminationGracePeriodSeconds", GONE),
    (policies.time_to_save, TRAIN, f"{POD} terminationGracePeriodSeconds", 60),
    (policies.time_to_save, TRAIN, f"{CONTAINER} env TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GONE),
    (policies.checked_before, TRAIN, f"{POD} initContainers wait", GONE),
    (policies.checked_before, TRAIN, f"{POD} initContainers wait args", ["wait"]),
    (policies.checked_before, TRAIN, f"{POD} initContainers preflight", GONE),
    (policies.checked_before, TRAIN, f"{POD} initContainers preflight args 2", GONE),
    (
        policies.checked_before,
        TRAIN,
        f"{POD} initContainers preflight resources limits nvidia.com/gpu",
        GONE,
    ),
    (
        policies.checked_before,
        TRAIN,
        f"{POD} initContainers preflight resources limits nvidia.com/gpu",
        2,
    ),
    (policies.cores_suffice, "ConfigMap xrai", "data NUM_THREADS", "5"),
    (policies.cores_suffice, "ConfigMap xrai", "data NUM_PROCESSES", "2"),
    (policies.cores_suffice, PREPROCESS, f"{POD} containers preprocess args 2", GONE),
    (policies.partitions_add_up, PREPROCESS, "spec completions", 3),
    (
        policies.partitions_add_up,
        PREPROCESS,
        f"{POD} containers preprocess args 1",
        "--partition=0/4",
    ),
    (policies.variables_known, TRAIN, f"{CONTAINER} args 5", "--rdzv_id=$(RUN)"),
    (policies.network_denied, "NetworkPolicy xrai", "spec policyTypes", ["Egress"]),
    (
        policies.network_denied,
        "NetworkPolicy xrai",
        "spec podSelector",
        {"matchLabels": {"app": "other"}},
    ),
    (policies.network_denied, "NetworkPolicy xrai", "spec ingress", [{}]),
    (policies.network_denied, "NetworkPolicy xrai", "spec egress", [{}]),
    (policies.network_denied, "NetworkPolicy xrai", "spec egress 1 ports", GONE),
    (policies.network_denied, "NetworkPolicy xrai", "spec egress 1 to 0 ipBlock except", GONE),
    (policies.network_denied, "NetworkPolicy xrai-train", "spec ingress", GONE),
    (policies.network_denied, "NetworkPolicy xrai-train", "spec egress 0 ports", [{"port": 29400}]),
]


@pytest.mark.parametrize(
    ("rule", "document", "place", "value"),
    BREAKS,
    ids=[f"{rule.__name__}: {document} {place.split()[-1]}" for rule, document, place, _ in BREAKS],
)
def test_a_rule_that_is_broken_is_reported(
    rule: Rule, document: str, place: str, value: Any
) -> None:
    documents = stand_alone()
    change(documents, document, place, value)
    assert rule(documents)


def test_every_rule_was_broken_once() -> None:
    assert {rule.__name__ for rule, *_ in BREAKS} == {rule.__name__ for rule in RULES}


def change(documents: list[Document], document: str, place: str, value: Any) -> None:
    """Put a value at a place: keys and, in lists, names or numbers, with spaces between. `GONE`
    removes.
    """
    kind, name = document.split()
    at: Any = json.loads(
        json.dumps(of_kind(documents, kind)[name])
    )  # YAML's anchors are shared objects
    documents[documents.index(of_kind(documents, kind)[name])] = at
    *path, last = place.split()
    for key in path:
        at = at[_key(at, key)]
    if value is GONE:
        del at[_key(at, last)]
    else:
        at[_key(at, last)] = value


def _key(at: Any, key: str) -> Any:
    if not isinstance(at, list):
        return key
    return int(key) if key.isdigit() else [entry["name"] for entry in at].index(key)


def test_train_job_stands_alone() -> None:
    """Whatever it names, other than the optional keys, is in the same file."""
    documents = read_documents(K8S / "train-job.yaml")
    assert {rule.__name__: broken for rule in RULES if (broken := rule(documents))} == {}
    kinds = [
        "ConfigMap",
        "ConfigMap",
        "ServiceAccount",
        "Service",
        "NetworkPolicy",
        "NetworkPolicy",
        "Job",
    ]
    assert [document["kind"] for document in documents] == kinds


def test_the_files_and_the_base_are_the_same() -> None:
    """Files, because a link is text to `kubectl apply -f https://…` and to clones on Windows."""
    for name in FILES:
        assert not (K8S / name).is_symlink(), f"{name} is a link: copy k8s/base/{name} to k8s/"
        assert (K8S / name).read_bytes() == (K8S / "base" / name).read_bytes(), (
            f"k8s/{name} and k8s/base/{name} differ: copy the one that is right"
        )
    assert yaml.safe_load((K8S / "base/kustomization.yaml").read_text())["resources"] == list(FILES)


@pytest.fixture
def own_overlay(tmp_path: Path) -> Path:
    """k8s/overlays/mine as docs/running.md shows it, in a copy of k8s/."""
    for part in ("base", "settings", "overlays"):
        shutil.copytree(K8S / part, tmp_path / "k8s" / part)
    own = tmp_path / "k8s/overlays/mine"
    own.mkdir()
    page = (REPOSITORY / "docs/running.md").read_text()
    for name, text in re.findall(r"```yaml\n# (\S+)\n(.*?)```", page, re.DOTALL):
        (own / name).write_text(text)
    return own


def test_an_overlay_of_ones_own_as_the_page_shows_it_keeps_all_rules(own_overlay: Path) -> None:
    """Its numbers stand once, and reach every place."""
    documents = render_folder(own_overlay)
    assert {rule.__name__: broken for rule in RULES if (broken := rule(documents))} == {}
    train = of_kind(documents, "Job")["xrai-train"]["spec"]
    assert (train["completions"], train["parallelism"]) == (4, 4)
    (container,) = train["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert container["image"] == "REGISTRY/xrai:0.1.0"


def test_the_two_commands_to_preprocess_with_100_pods_do_so(own_overlay: Path) -> None:
    page = (REPOSITORY / "docs/decisions/0028-indexed-jobs.md").read_text()
    change_number, apply = re.findall(r"^    (.+)$", page, re.MULTILINE)
    assert apply == "kubectl apply -k k8s/overlays/mine"
    root = own_overlay.parents[2]
    subprocess.run(["bash", "-euc", change_number], cwd=root, check=True, timeout=20)
    documents = render_folder(own_overlay)
    assert {rule.__name__: broken for rule in RULES if (broken := rule(documents))} == {}
    assert of_kind(documents, "Job")["xrai-preprocess"]["spec"]["completions"] == 100


def test_a_jobset_of_ones_own_allows_as_many_failures_as_it_has_nodes(own_overlay: Path) -> None:
    jobset = own_overlay.parent / "jobset/kustomization.yaml"
    jobset.write_text(jobset.read_text().replace("../gpu", "../mine"))
    documents = render_folder(jobset.parent)
    assert {rule.__name__: broken for rule in RULES if (broken := rule(documents))} == {}
    _, jobs = jobset_of(documents)
    assert jobs["train"]["backoffLimit"] == jobs["train"]["completions"] == 4


def test_a_job_is_never_shown_to_be_deleted_before_its_pods_are_gone() -> None:
    """Else two pods of one name run for some seconds when it is applied again."""
    files = [*(REPOSITORY / "docs").rglob("*.md"), *K8S.rglob("*.yaml"), REPOSITORY / "README.md"]
    shown = [
        line
        for path in files
        for line in path.read_text().splitlines()
        if re.search(r"kubectl delete (job|-[fk])", line)
    ]
    assert shown and all("--cascade=foreground" in line for line in shown)


def test_the_page_names_every_overlay_and_every_container() -> None:
    page = (REPOSITORY / "docs/running.md").read_text()
    for overlay in OVERLAYS:
        assert f"| `{overlay}` |" in page, overlay
    for container in ("wait", "preflight", "train"):
        assert f"| `{container}`, " in page, container
    for name in re.findall(r"`((?:k8s|tests|docker|docs)/[\w./-]+)`", page):
        assert (REPOSITORY / name).exists() or "mine" in name, name


def test_messages_that_the_page_quotes_are_those_of_the_code() -> None:
    """Those of Kubernetes are listed here."""
    page = (REPOSITORY / "docs/running.md").read_text()
    section = page[page.index("To train again, or with another") : page.index("## Millions of")]
    prose = [line for line in section.splitlines() if not line.startswith("    ")]
    code = "".join(path.read_text() for path in sorted((REPOSITORY / "xrai").rglob("*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # texts that go on in the next line
    quoted = [text for line in prose for text in re.findall(r'"([^"]+)"', line)]
    parts = {part.strip() for text in quoted for part in re.split(r"…|\b\d+\b", text)}
    assert {part for part in parts if part not in code} == {
        *("field is immutable", "Usage of EmptyDir volume", "exceeds the limit"),
        *("forbidden: failed quota", "must specify limits.cpu"),
    }
    assert {"has not answered for", "did not all come to", "is being written by"} <= parts


def test_the_cpu_overlay_asks_for_no_gpu_and_the_gpu_overlay_for_as_many_as_processes() -> None:
    assert "nvidia.com/gpu" not in json.dumps(render("cpu"))
    container = of_kind(render("gpu"), "Job")["xrai-train"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    assert (
        container["resources"]["requests"]["nvidia.com/gpu"]
        == container["resources"]["limits"]["nvidia.com/gpu"]
        == 4
    )


def test_production_has_identities_and_no_key() -> None:
    documents = render("production")
    assert of_kind(documents, "Secret") == {}
    for workload in workloads(documents):
        assert not any(
            "secretRef" in source for c in workload.containers for source in c["envFrom"]
        ), workload.name
    accounts = of_kind(documents, "ServiceAccount")
    roles = {
        account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
        for account in accounts.values()
    }
    assert len(roles) == len(accounts) == 3


def test_the_development_s3_has_the_buckets_and_keys_that_the_jobs_use() -> None:
    documents = render("s3-dev")
    settings = of_kind(documents, "ConfigMap")["xrai"]["data"]
    s3 = of_kind(documents, "Deployment")["xrai-s3"]["spec"]["template"]["spec"]["containers"][0]
    buckets = {variable["name"]: variable["value"] for variable in s3["env"]}["S3_BUCKET"].split(
        ","
    )
    for name in ("XRAI_DATASET", "XRAI_ARTIFACTS"):
        assert settings[name].removeprefix("s3://").split("/")[0] in buckets
    assert settings["AWS_ENDPOINT_URL_S3"] == "http://xrai-s3:8333"
    assert of_kind(documents, "Service")["xrai-s3"]["spec"]["ports"][0]["port"] == 8333
    assert set(of_kind(documents, "Secret")["xrai-s3"]["data"]) == {
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
    }


def test_the_development_cluster_fits_two_cpus_and_ends_soon() -> None:
    """All pods at once, also those that wait, so that none waits for another one's place."""
    documents = render("s3-dev")
    for resource, most in (("cpu", 1.5), ("memory", 3 * 2**30), ("ephemeral-storage", 6 * 2**30)):
        asked = sum(
            (workload.job or {}).get("parallelism", 1) * requested(workload, resource)
            for workload in workloads(documents)
        )
        assert 0 < asked < most, resource
    config = of_kind(documents, "ConfigMap")["xrai-config"]["data"]["config.yaml"]
    assert yaml.safe_load(config)["train"]["epochs"] <= 5


def test_what_the_development_cluster_needs_is_said_where_one_looks() -> None:
    documents = render("s3-dev")
    total = {
        resource: sum(
            (workload.job or {}).get("parallelism", 1) * requested(workload, resource)
            for workload in workloads(documents)
        )
        for resource in ("cpu", "memory", "ephemeral-storage")
    }
    words = (
        f"request {total['cpu']:.1f} CPUs, {total['memory'] / 2**30:.1f} GiB of memory and "
        f"{total['ephemeral-storage'] / 2**30:.0f} GiB of disk"
    )
    overlay = (K8S / "overlays/s3-dev/kustomization.yaml").read_text().replace("\n# ", " ")
    page = (REPOSITORY / "docs/running.md").read_text().replace("requests", "request")
    assert words in overlay and words in page


def test_the_s3_servers_report_to_nobody_and_serve_s3_alone() -> None:
    container = of_kind(render("s3-dev"), "Deployment")["xrai-s3"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    compose = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"]["s3"]
    switches = {"-master.telemetry=false", "-webdav=false", "-admin.ui=false"}
    for command in (container["command"], compose["command"]):
        assert switches <= set(command)


def test_the_jobset_trains_after_preprocessing_and_is_all_there_is() -> None:
    documents = render("jobset")
    assert of_kind(documents, "Job") == {}
    jobs = of_kind(documents, "JobSet")["xrai"]["spec"]["replicatedJobs"]
    assert [job["name"] for job in jobs] == ["preprocess", "train"]
    assert jobs[1]["dependsOn"] == [{"name": "preprocess", "status": "Complete"}]
    original = of_kind(render("gpu"), "Job")
    for job in jobs:
        spec = original[f"xrai-{job['name']}"]["spec"]
        del spec["ttlSecondsAfterFinished"]
        if job["name"] == "train":
            spec["backoffLimit"] = 2  # = NUM_NODES
            spec["podFailurePolicy"]["rules"][0]["action"] = "FailJob"
        assert job["template"]["spec"] == spec


def jobset_of(documents: list[Document]) -> tuple[Document, dict[str, Document]]:
    """The failure policy of the JobSet, and the specs of its Jobs by name."""
    spec = of_kind(documents, "JobSet")["xrai"]["spec"]
    jobs = {job["name"]: job["template"]["spec"] for job in spec["replicatedJobs"]}
    return spec["failurePolicy"], jobs


EVICTED = Ended("xrai-train-0", status=143, is_disrupted=True)
LEFT = Ended("xrai-train-1")  # it lost pod 0
ENDS = {
    "pod 1 is evicted": ([Ended("xrai-train-1", is_disrupted=True)], UNCOUNTED),
    "pod 0 is evicted": ([EVICTED, LEFT], UNCOUNTED),
    "pod 0 is evicted, and pod 1 ends sooner": ([LEFT, EVICTED], UNCOUNTED),
    "preflight finds a mistake": (
        [Ended("xrai-train-1", status=2, container="preflight")],
        "FailJobSet",
    ),
    "wait finds a mistake": ([Ended("xrai-train-0", status=2, container="wait")], "FailJobSet"),
    "all pods fail again and again": ([LEFT, Ended("xrai-train-0")] * 2, "RestartJobSet"),
    "a pod needs too much memory each time": ([Ended("xrai-train-0", 137)] * 3, "RestartJobSet"),
}


@pytest.mark.parametrize(("ended", "action"), ENDS.values(), ids=ENDS)
def test_the_jobset_does_not_count_evictions_and_does_not_try_a_mistake_again(
    ended: list[Ended], action: str
) -> None:
    policy, jobs = jobset_of(render("jobset"))
    failure = job_failure(jobs["train"], ended)
    assert failure is not None and jobset_action(policy, "train", failure) == action
    assert policy["maxRestarts"] > 0


@pytest.mark.parametrize(
    ("failure", "action"),
    [
        (Failure("FailedIndexes", "Job has failed indexes"), "RestartJobSet"),
        (
            Failure(
                "PodFailurePolicy",
                "Container preprocess for pod films/xrai-preprocess-0-1 failed with exit code 2 "
                "matching FailJob rule at index 1",
            ),
            "FailJobSet",
        ),
    ],
)
def test_a_jobset_whose_preprocessing_fails_is_restarted_unless_it_is_a_mistake(
    failure: Failure, action: str
) -> None:
    policy, _ = jobset_of(render("jobset"))
    assert jobset_action(policy, "preprocess", failure) == action


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("backoffLimit", 0),
        ("podFailurePolicy rules 0 action", "Ignore"),
        ("podFailurePolicy rules 1", GONE),
        ("ttlSecondsAfterFinished", 3600),
    ],
)
def test_a_job_of_the_jobset_that_breaks_a_rule_is_reported(place: str, value: Any) -> None:
    documents = render("jobset")
    change(documents, "JobSet xrai", f"spec replicatedJobs train template spec {place}", value)
    assert policies.jobs_replace_what_was_lost(documents)


@pytest.mark.parametrize("action", ["Ignore", "Count"])
def test_a_jobset_whose_job_replaces_evicted_pods_itself_is_found(action: str) -> None:
    _, jobs = jobset_of(render("jobset"))
    jobs["train"]["podFailurePolicy"]["rules"][0]["action"] = action
    assert job_failure(jobs["train"], [EVICTED]) is None


def test_an_eviction_counts_where_a_pod_that_it_takes_with_it_ends_the_job() -> None:
    """Why backoffLimit is not 0, as it is in JobSet's examples."""
    policy, jobs = jobset_of(render("jobset"))
    jobs["train"]["backoffLimit"] = 0
    failure = job_failure(jobs["train"], [LEFT, EVICTED])
    assert failure is not None and failure.reason == "BackoffLimitExceeded"
    assert jobset_action(policy, "train", failure) == "RestartJobSet"


def test_the_order_of_the_jobsets_rules_matters() -> None:
    policy, jobs = jobset_of(render("jobset"))
    policy["rules"].reverse()
    failure = job_failure(jobs["train"], [EVICTED])
    assert failure is not None and jobset_action(policy, "train", failure) != UNCOUNTED


def test_the_trainjob_leaves_to_trainer_what_trainer_tells_torchrun() -> None:
    documents = render("trainjob")
    assert list(of_kind(documents, "Job")) == ["xrai-preprocess"]
    assert of_kind(documents, "TrainJob")["xrai"]["spec"]["trainer"] == {
        "numNodes": 2,
        "numProcPerNode": 4,
    }
    (workload,) = (workload for workload in workloads(documents) if workload.component == "train")
    (container,) = workload.pod["containers"]
    assert container["name"] == "node" and "subdomain" not in workload.pod
    assert not any(
        arg.startswith(("--nnodes", "--nproc", "--rdzv", "--master", "--node"))
        for arg in container["args"]
    )
    assert not any(
        variable["name"].startswith("PET_") for variable in container["env"]
    )  # Trainer refuses those


def test_kueue_lets_both_jobs_in_together() -> None:
    documents = render("kueue")
    jobs = of_kind(documents, "Job")
    queue = of_kind(documents, "LocalQueue")["xrai"]
    for job in jobs.values():
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
        assert job["spec"]["suspend"] is True
    (group,) = of_kind(documents, "ClusterQueue")[queue["spec"]["clusterQueue"]]["spec"][
        "resourceGroups"
    ]
    (flavor,) = group["flavors"]
    assert flavor["name"] in of_kind(documents, "ResourceFlavor")
    for quota in flavor["resources"]:
        asked = sum(
            job["spec"]["parallelism"] * _number(requests(job).get(quota["name"], 0))
            for job in jobs.values()
        )
        assert _number(quota["nominalQuota"]) == asked, quota["name"]


def requests(job: Document) -> Document:
    """Of the container that does the work; those before it ask for no more."""
    found: Document = job["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]
    return found


def _number(quantity: Any) -> int:
    return int(str(quantity).removesuffix("Gi"))
