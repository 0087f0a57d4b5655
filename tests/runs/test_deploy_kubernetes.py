"""What is shipped in deploy/kubernetes: valid as it lies there and as kustomize builds it, and confined."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from peel_agent.config import load_settings
from tests.runs.deployment import MANIFESTS, POD_MAKERS, agent_container, image_environment, pod_specs, run

VERSIONS = ("1.29", "1.33", kubernetes_validate.latest_version())
"""Kubernetes as the sidecar needs it at least, with sidecars as a stable feature, and the newest that is known."""

CUSTOM = "PodMonitor"
"""The one kind that is not Kubernetes's own: the Prometheus operator's, whose schema no package has."""

GPU = "nvidia.com/gpu"
BUILDS = ("base", *(f"overlays/{path.name}" for path in sorted((MANIFESTS / "overlays").iterdir())))
PLAIN = [
    path for path in sorted(MANIFESTS.rglob("*.yaml"))
    if path.name not in ("kustomization.yaml", "no-deployment.yaml") and path.parent.name != "gpu"
]  # fmt: skip
"""Manifests that are whole as they lie there; the others are patches."""

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl, whose kustomize builds the overlays")


def validate(document: dict[str, Any], version: str) -> None:
    """Raises for a field that is unknown or has another type."""
    kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid(version: str) -> None:
    """As Kubernetes's own schema has it, no field unknown; an unknown one is seen."""
    documents = [document for path in PLAIN for document in yaml.safe_load_all(path.read_text())]
    assert {document["kind"] for document in documents} == {"Deployment", "Job", "PersistentVolumeClaim", CUSTOM}
    for document in documents:
        if document["kind"] != CUSTOM:
            validate(document, version)
    deployment = next(document for document in documents if document["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(deployment, version)


def built(overlay: str | Path) -> dict[str, dict[str, Any]]:
    """What kustomize makes of it, by kind."""
    made = run("kubectl", "kustomize", MANIFESTS / overlay)
    assert (made.returncode, made.stderr) == (0, "")
    documents = list(yaml.safe_load_all(made.stdout))
    assert len({document["kind"] for document in documents}) == len(documents)
    return {document["kind"]: document for document in documents}


@needs_kubectl
@pytest.mark.parametrize("overlay", BUILDS)
def test_every_overlay_builds(overlay: str) -> None:
    """kustomize builds it, what it makes is valid, and its names fit: configuration, claims, labels of the monitor."""
    kinds = built(overlay)
    for version in VERSIONS:
        for kind, document in kinds.items():
            if kind != CUSTOM:
                validate(document, version)
    maker = kinds.get("Deployment") or kinds["Job"]
    assert ("Job" in kinds) == (overlay == "overlays/sidecar")
    template = maker["spec"]["template"]
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert volumes["configuration"]["configMap"]["name"] == kinds["ConfigMap"]["metadata"]["name"]
    assert volumes["state"]["persistentVolumeClaim"]["claimName"] == kinds["PersistentVolumeClaim"]["metadata"]["name"]
    asked = agent_container(template["spec"])["resources"]["limits"]
    assert (GPU in asked) == (overlay == "overlays/gpu") == agent_container(template["spec"])["image"].endswith(":cuda")
    if CUSTOM in kinds:
        monitor = kinds[CUSTOM]["spec"]
        assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        assert monitor["jobLabel"] in template["metadata"]["labels"]
        (endpoint,) = monitor["podMetricsEndpoints"]
        assert endpoint["port"] in {port["name"] for port in agent_container(template["spec"])["ports"]}
        assert endpoint["path"] == "/metrics"


@needs_kubectl
def test_the_kustomization_that_is_shown_builds(tmp_path: Path) -> None:
    """The one in deploy/README.md, beside a copy of the repository; its namespace, image, claim and settings count."""
    (shown,) = re.findall(r"```yaml\n(resources:.*?)```", (MANIFESTS.parent / "README.md").read_text(), flags=re.DOTALL)
    shutil.copytree(MANIFESTS, tmp_path / "peel-agent" / "deploy" / "kubernetes")
    (tmp_path / "kustomization.yaml").write_text(shown)
    (tmp_path / "peel.toml").write_text('[watch]\npath = "/runs/other"\n')
    kinds = built(tmp_path)
    assert {document["metadata"]["namespace"] for document in kinds.values()} == {"trainings"}
    assert '"/runs/other"' in kinds["ConfigMap"]["data"]["peel.toml"]
    pod = kinds["Deployment"]["spec"]["template"]["spec"]
    assert agent_container(pod)["image"] == "registry.example/peel-agent:cpu"
    claims = {volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]}
    assert claims["checkpoints"] == "my-checkpoints"
    assert CUSTOM in kinds


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_the_agent_is_confined(kind: str) -> None:
    """No user 0, no capability, no token of the cluster, a read-only root, the runtime's seccomp profile, limits."""
    pod, agent = pod_specs()[kind], agent_container(pod_specs()[kind])
    assert pod["automountServiceAccountToken"] is False
    assert not {"serviceAccountName", "hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert agent["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= set(agent["resources"]["requests"])
    assert "memory" in agent["resources"]["limits"]
    assert GPU not in agent["resources"]["limits"]


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_what_the_agent_writes_is_mounted(kind: str) -> None:
    """The image's volume is the state's claim, /tmp is there for the locks of devices, the configuration is where it is
    looked for; every mount has its volume, and every volume is mounted.
    """
    pod, agent = pod_specs()[kind], agent_container(pod_specs()[kind])
    mounts = {mount["mountPath"]: mount for mount in agent["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    assert "persistentVolumeClaim" in volumes[mounts[image_environment()["STATE_DIRECTORY"]]["name"]]
    assert "emptyDir" in volumes[mounts["/tmp"]["name"]]
    configuration = Path(agent["args"][agent["args"].index("-c") + 1])
    assert "configMap" in volumes[mounts[str(configuration.parent)]["name"]]
    assert configuration.name == "peel.toml"


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_the_probes_ask_what_the_settings_serve(kind: str) -> None:
    """Alive is /healthz, ready is /readyz, at the port that peel.toml has the agent listen at for everybody."""
    agent = agent_container(pod_specs()[kind])
    (port,) = agent["ports"]
    asked = {probe: agent[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    assert {agent[probe]["httpGet"]["port"] for probe in asked} == {port["name"]}
    settings = load_settings(MANIFESTS / "base" / "peel.toml", {})
    assert settings.health.listen == f":{port['containerPort']}"
    places = [str(settings.watch.path), str(settings.probe.path)]
    (checkpoints,) = [mount["mountPath"] for mount in agent["volumeMounts"] if mount["name"] == "checkpoints"]
    assert [place for place in places if not place.startswith(f"{checkpoints}/")] == []


def test_one_agent_has_a_ledger() -> None:
    """The Deployment never has two pods, and only reads the checkpoints. A Job does not wait for its sidecar."""
    deployment = yaml.safe_load((MANIFESTS / POD_MAKERS[0]).read_text())["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    (checkpoints,) = [volume for volume in pod_specs()["Deployment"]["volumes"] if volume["name"] == "checkpoints"]
    assert checkpoints["persistentVolumeClaim"]["readOnly"] is True
    (sidecar,) = pod_specs()["Job"]["initContainers"]
    assert (sidecar["name"], sidecar["restartPolicy"]) == ("peel-agent", "Always")


def test_no_role_and_no_secret_is_shipped() -> None:
    """The agent asks nothing of the cluster, and what is secret comes from a Secret of the user's."""
    text = "\n".join(path.read_text() for path in MANIFESTS.rglob("*") if path.is_file())
    for word in ("rbac.authorization", "ServiceAccount\n", "kind: Role", "kind: Secret", "stringData"):
        assert word not in text
    for pod in pod_specs().values():
        assert agent_container(pod)["envFrom"] == [{"secretRef": {"name": "peel-agent", "optional": True}}]
