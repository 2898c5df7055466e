"""What the controllers of Jobs and JobSets decide when pods end, as their documentation says it.

Jobs: https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy. Rules are
tried in order; a Job fails of the policy before it fails of its backoffLimit, and of its
backoffLimit when more pods than that have failed. JobSets (0.10 or newer):
https://jobset.sigs.k8s.io/docs/tasks/failure_policy/. The first rule counts whose reasons and
patterns all match, where an empty list matches anything; without one the JobSet restarts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tests.k8s.manifests import Document


@dataclass(frozen=True)
class Ended:
    """A pod that failed: the exit status of one of its containers, and whether it was evicted."""

    name: str
    status: int = 1
    container: str = "train"
    is_disrupted: bool = False


@dataclass(frozen=True)
class Failure:
    """Why a Job failed, as its condition says it."""

    reason: str
    message: str


def job_failure(job: Document, ended: Sequence[Ended]) -> Failure | None:
    """Why a Job fails whose pods end in this order; None: it replaces them."""
    num_failed = 0
    for pod in ended:
        action, message = _decide(job.get("podFailurePolicy", {}).get("rules", []), pod)
        if action == "FailJob":
            return Failure("PodFailurePolicy", message)
        num_failed += action != "Ignore"
        if num_failed > job.get("backoffLimit", 6):
            message = "Job has reached the specified backoff limit"
            return Failure("BackoffLimitExceeded", message)
    return None


def _decide(rules: list[Document], pod: Ended) -> tuple[str, str]:
    """The action of the first rule that a failed pod matches, and what the Job says of it."""
    for index, rule in enumerate(rules):
        end = f"matching {rule['action']} rule at index {index}"
        if "onExitCodes" in rule:
            codes = rule["onExitCodes"]
            if (pod.status in codes["values"]) == (codes["operator"] == "In"):
                said = f"Container {pod.container} for pod films/{pod.name} failed with exit code"
                return rule["action"], f"{said} {pod.status} {end}"
        elif pod.is_disrupted and rule["onPodConditions"][0]["type"] == "DisruptionTarget":
            said = f"Pod films/{pod.name} has condition DisruptionTarget"
            return rule["action"], f"{said} {end}"
    return "Count", ""


def jobset_action(policy: Document, job: str, failure: Failure) -> str:
    """What a JobSet with this failure policy does when its replicated job of this name fails."""
    for rule in policy.get("rules", []):
        reasons = rule.get("onJobFailureReasons") or [failure.reason]
        patterns = rule.get("onJobFailureMessagePatterns") or [""]
        targets = rule.get("targetReplicatedJobs") or [job]
        is_found = any(re.search(pattern, failure.message) for pattern in patterns)
        if failure.reason in reasons and is_found and job in targets:
            return str(rule["action"])
    return "RestartJobSet"
