"""launch/mpijob.yaml and the image it runs must agree; neither knows the other."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="needs PyYAML: pip install pyyaml")

PROJECT = Path(__file__).parent.parent
# the operator's manifests/base/kubeflow.org_mpijobs.yaml
SCHEMA = os.environ.get("HVD_SPARSE_MPIJOB_SCHEMA", "")


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return yaml.safe_load((PROJECT / "launch" / "mpijob.yaml").read_text())


def container(job: dict[str, Any], role: str) -> dict[str, Any]:
    (only,) = job["spec"]["mpiReplicaSpecs"][role]["template"]["spec"]["containers"]
    return only


def dockerfile() -> str:
    path = PROJECT / "Dockerfile"
    if not path.exists():
        pytest.skip("needs the Dockerfile, which an image of the project has not")
    return path.read_text()


def test_it_is_the_operators_v2beta1(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")


def refuse_unknown(schema: Any) -> None:
    """Fields that the schema does not name are wrong, as `kubectl apply` has it."""
    if isinstance(schema, list):
        for part in schema:
            refuse_unknown(part)
    if not isinstance(schema, dict):
        return
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in schema and not open_ended:
        schema.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    for part in schema.values():
        refuse_unknown(part)


@pytest.mark.skipif(not SCHEMA, reason="needs HVD_SPARSE_MPIJOB_SCHEMA: a file")
def test_it_fits_the_operators_published_schema(job: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
    versions = yaml.safe_load(Path(SCHEMA).read_text())["spec"]["versions"]
    (schema,) = (v["schema"] for v in versions if v["name"] == "v2beta1")
    schema = schema["openAPIV3Schema"]
    refuse_unknown(schema)
    schema["properties"]["metadata"] = {"type": "object"}  # is Kubernetes' own
    validator = jsonschema.Draft202012Validator(schema)
    assert [error.message for error in validator.iter_errors(job)] == []
    job["spec"]["slots"] = 2
    assert not validator.is_valid(job)


def test_there_are_as_many_ranks_as_slots(job: dict[str, Any]) -> None:
    arguments = container(job, "Launcher")["args"]
    slots = job["spec"]["slotsPerWorker"]
    workers = job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"]
    assert int(arguments[arguments.index("-np") + 1]) == slots * workers


@pytest.mark.parametrize("role", ["Launcher", "Worker"])
def test_every_argument_is_a_string(job: dict[str, Any], role: str) -> None:
    """Kubernetes refuses a bare number."""
    words = container(job, role)["command"] + container(job, role)["args"]
    assert all(isinstance(word, str) for word in words)


@pytest.mark.parametrize("role", ["Launcher", "Worker"])
def test_the_user_is_the_images(job: dict[str, Any], role: str) -> None:
    user = container(job, role)["securityContext"]["runAsUser"]
    assert {int(uid) for uid in re.findall(r"--uid (\d+)", dockerfile())} == {user}


def test_the_workers_listen_where_ssh_knocks(job: dict[str, Any]) -> None:
    worker = container(job, "Worker")
    ports = {worker["ports"][0]["containerPort"]}
    ports.add(worker["readinessProbe"]["tcpSocket"]["port"])
    for name in ("sshd_config", "ssh_config"):
        text = (PROJECT / "launch" / name).read_text()
        (port,) = re.findall(r"^\s*Port (\d+)$", text, re.MULTILINE)
        ports.add(int(port))
    assert ports == {2222}


def test_the_key_is_where_sshd_looks(job: dict[str, Any]) -> None:
    text = (PROJECT / "launch" / "sshd_config").read_text()
    assert f"HostKey {job['spec']['sshAuthMountPath']}/" in text


def test_programs_are_those_of_the_image(job: dict[str, Any]) -> None:
    (folder,) = set(re.findall(r"^WORKDIR (\S+)$", dockerfile(), re.MULTILINE))
    launcher = container(job, "Launcher")
    assert launcher["command"] == [f"{folder}/.venv/bin/mpirun"]
    assert f"{folder}/.venv/bin/python" in launcher["args"]
    script = next(word for word in launcher["args"] if word.endswith(".py"))
    assert (PROJECT / script).is_file()
