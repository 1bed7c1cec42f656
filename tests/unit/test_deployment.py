"""What examples/ holds for containers and Kubernetes, as far as it can be checked without either."""

from __future__ import annotations

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

import kubernetes_validate
import pytest
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
    assert pod["spec"]["terminationGracePeriodSeconds"] > last_words


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
