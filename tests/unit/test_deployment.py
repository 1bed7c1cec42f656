"""What examples/ holds for containers and Kubernetes, as far as it can be checked without either."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import torch
import yaml

from tests.unit.test_package import wheel_of

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS, KUBERNETES = ROOT / "examples" / "containers", ROOT / "examples" / "kubernetes"
CPU = CONTAINERS / "cpu.Dockerfile"


@pytest.mark.parametrize("name", ["Dockerfile", "cpu.Dockerfile"])
def test_dockerfiles_are_clean(name: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, CONTAINERS / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def manifests() -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all((KUBERNETES / "deployment.yaml").read_text()) if one]


def test_manifests_fit_their_schemas() -> None:
    for one in manifests():
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**manifests()[1], "spec": {}}, kubernetes_validate.latest_version(), strict=True)


def test_manifests_fit_each_other() -> None:
    claim, deployment, service, budget = manifests()
    pod = deployment["spec"]["template"]
    container = pod["spec"]["containers"][0]
    labels = pod["metadata"]["labels"].items()
    for selector in (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]):
        assert selector.items() <= labels
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    volumes = {one["name"]: one for one in pod["spec"]["volumes"]}
    assert {one["name"] for one in container["volumeMounts"]} == set(volumes)
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    last_words = int(container["args"][container["args"].index("--shutdown-timeout") + 1])
    waits = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > waits + last_words
    user = re.findall(r"^USER (\d+)$", (CONTAINERS / "Dockerfile").read_text(), re.MULTILINE)
    for one in (pod["spec"], *pods(ray_service()[1])):
        assert str(one["securityContext"]["runAsUser"]) == user[-1], "to whom the image's folder for models belongs"


def fields(optional: dict[str, Any] | None = None, **required: Any) -> dict[str, Any]:
    """Of a schema: an object that has these and no others."""
    properties = required | (optional or {})
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


TEXT, COUNT, SWITCH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
GROUP = {
    "rayStartParams": {"type": "object", "additionalProperties": TEXT},
    "template": fields(spec={"type": "object"}),
}
WORKERS = fields({"replicas": COUNT}, groupName=TEXT, minReplicas=COUNT, maxReplicas=COUNT, **GROUP)
# As much of KubeRay's as ours uses: the whole is in no package. ORTHRUS_TEST_RAYSERVICE_CRD may name a file of it.
RAY_SERVICE = fields(
    serveConfigV2=TEXT,
    rayClusterConfig=fields(
        {"enableInTreeAutoscaling": SWITCH},
        rayVersion=TEXT,
        headGroupSpec=fields(**GROUP),
        workerGroupSpecs={"type": "array", "items": WORKERS},
    ),
)


def ray_service() -> tuple[dict[str, Any], dict[str, Any]]:
    """The claim of a volume, and what KubeRay is asked for."""
    claim, service = yaml.safe_load_all((KUBERNETES / "rayservice.yaml").read_text())
    return claim, service


def pods(service: dict[str, Any]) -> list[dict[str, Any]]:
    """Head first."""
    cluster = service["spec"]["rayClusterConfig"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_ray_service_fits_its_schemas() -> None:
    claim, service = ray_service()
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(claim, version, strict=True)
    for pod in pods(service):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": pod}
        kubernetes_validate.validate(whole, version, strict=True)
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    jsonschema.validate(service["spec"], RAY_SERVICE)
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplica"] = 4
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(service["spec"], RAY_SERVICE)


@pytest.mark.skipif("ORTHRUS_TEST_RAYSERVICE_CRD" not in os.environ, reason="no file of KubeRay's schema")
def test_the_ray_service_fits_the_whole_schema() -> None:
    definition = yaml.safe_load(Path(os.environ["ORTHRUS_TEST_RAYSERVICE_CRD"]).read_text())
    schema = next(one["schema"]["openAPIV3Schema"] for one in definition["spec"]["versions"] if one["name"] == "v1")
    jsonschema.validate(ray_service()[1], closed(schema))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"spec": {"rayClusterConfig": {"headGroupSpec": {}}}}, closed(schema))


def closed(schema: Any) -> Any:
    """As Kubernetes reads it: fields that are not named are mistakes, and some numbers may be strings."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    read = {name: closed(one) for name, one in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        read.pop("type", None)
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        read.setdefault("additionalProperties", False)
    return read


def test_the_ray_service_fits_the_example_and_the_image() -> None:
    claim, service = ray_service()
    deployed = yaml.safe_load(service["spec"]["serveConfigV2"])
    by_hand = yaml.safe_load((ROOT / "examples" / "ray_serve" / "qwen3-8b.yaml").read_text())
    assert deployed["applications"] == by_hand["applications"]
    head, worker = pods(service)
    assert head["containers"][0]["image"] == worker["containers"][0]["image"], "one version everywhere"
    volumes = {one["name"]: one for one in worker["volumes"]}
    assert {one["name"] for one in worker["containers"][0]["volumeMounts"]} == set(volumes)
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    pinned = re.search(r'"ray\[[a-z,]+\]==(.+)"', (CONTAINERS / "Dockerfile").read_text())
    assert pinned is not None and pinned[1] == service["spec"]["rayClusterConfig"]["rayVersion"]


def every_command() -> Iterator[list[str]]:
    """Arguments of `vllm serve` wherever an example has some."""
    yield manifests()[1]["spec"]["template"]["spec"]["containers"][0]["args"]
    yield yaml.safe_load((CONTAINERS / "compose.yaml").read_text())["services"]["vllm"]["command"]
    stack = yaml.safe_load((KUBERNETES / "production-stack.yaml").read_text())
    yield stack["servingEngineSpec"]["modelSpec"][0]["vllmConfig"]["extraArgs"]


def test_settings_are_ours() -> None:
    for arguments in every_command():
        assert json.loads(arguments[arguments.index("--speculative-config") + 1]) == {"method": "orthrus"}


def test_compose_mounts_what_is_there() -> None:
    services = yaml.safe_load((CONTAINERS / "compose.yaml").read_text())["services"]
    sources = [mount.split(":")[0] for one in services.values() for mount in one.get("volumes", ())]
    assert sum(source.startswith(".") for source in sources) == 4
    assert all((CONTAINERS / source).exists() for source in sources if source.startswith("."))
    build = services["vllm"]["build"]
    assert ((CONTAINERS / build["context"]) / build["dockerfile"]).resolve() == CONTAINERS / "Dockerfile"


def context(to: Path) -> None:
    """What a build of an image gets to see."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if any(fnmatch(name, f"{one}/*") or name == one for one in kept):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name, follow_symlinks=False)


def test_the_cpu_image_has_what_the_kernels_are_linked_to() -> None:
    """vLLM only warns of kernels that cannot be loaded."""
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this vLLM is not the one for processors")
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None and vllm.origin is not None
    needed = {name for one in Path(vllm.origin).parent.glob("_C*.so") for name in libraries(one)}
    ours = {"libnuma.so.1": "libnuma1", "libgomp.so.1": "g++", "libstdc++.so.6": "g++", "libgcc_s.so.1": "g++"}
    of_the_image = re.compile(r"lib(c|m|dl|rt|pthread|torch.*|c10.*|shm)\.so.*|ld-linux.*")
    assert "libnuma.so.1" in needed
    for name in needed:
        bundled = "-" in name  # beside the wheel, under a name of its own
        assert bundled or of_the_image.fullmatch(name) or f" {ours[name]}=" in CPU.read_text(), name


def libraries(shared_object: Path) -> list[str]:
    said = subprocess.run(["ldd", shared_object], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in said.splitlines() if "=>" in line]


def test_a_wheel_can_be_built_from_the_context(tmp_path: Path) -> None:
    """`.dockerignore` leaves nothing out that the package needs."""
    context(tmp_path / "source")
    assert wheel_of(tmp_path / "source", tmp_path).is_file()


@pytest.mark.skipif(not os.environ.get("ORTHRUS_TEST_THOROUGH"), reason="makes an environment, for some minutes")
def test_the_cpu_images_steps(tmp_path: Path) -> None:
    """In a folder of their own; the package of a compiler apart, which is the machine's."""
    context(tmp_path)
    steps = re.findall(r"^RUN (python3 .*)$", CPU.read_text(), re.MULTILINE)
    assert len(steps) == 1
    for step in steps:
        subprocess.run(["bash", "-ec", step], cwd=tmp_path, check=True)
    entry, command = (
        json.loads(one) for one in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", CPU.read_text(), re.MULTILINE)
    )
    started = [entry[0].replace("/orthrus", str(tmp_path)), *entry[1:], *command, "--per-class", "1"]
    done = subprocess.run(started, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "same text as plain" in done.stdout, done.stdout + done.stderr
