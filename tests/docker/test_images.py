"""The container files match the project: files, extras and commands that they name exist. No image is built here."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from tests.support.pages import resolve
from tests.support.paths import ROOT

DOCKER = ROOT / "docker"
IMAGES = sorted(DOCKER.glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))
SERVICES = COMPOSE["services"]
BUILDS = {service["image"]: service["build"] for service in SERVICES.values() if "build" in service}


def instructions(image: Path) -> list[tuple[str, str]]:
    """Instruction and arguments of each line of a Dockerfile."""
    text = re.sub(r"^#.*\n", "", image.read_text("utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def arguments_of(image: Path, word: str) -> list[str]:
    return [rest for found, rest in instructions(image) if found == word]


def allowed() -> set[str]:
    """The exceptions of .dockerignore, which excludes everything else."""
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert lines[1] == "*"
    return {line[1:] for line in lines if line.startswith("!")}


def parse(arguments: list[str]) -> None:
    """Parse a command as click does, without running it; raises UsageError."""
    command, rest = resolve(arguments)
    command.make_context(command.name, rest)


def words(command: str | list[str]) -> list[str]:
    return shlex.split(command) if isinstance(command, str) else list(command)


def entry(service: dict[str, Any]) -> list[str]:
    """The command line of a service: its entry point, or the image's, and its command."""
    entrypoint = service.get("entrypoint")
    if entrypoint is None:
        (text,) = arguments_of(ROOT / BUILDS[service["image"]]["dockerfile"], "ENTRYPOINT")
        entrypoint = json.loads(text)
    return [*words(entrypoint), *words(service.get("command", []))]


def ours() -> Iterator[tuple[str, dict[str, Any]]]:
    return ((name, service) for name, service in SERVICES.items() if service["image"].startswith("datamerge-"))


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_copied_files_exist_and_reach_the_build(image: Path) -> None:
    for rest in arguments_of(image, "COPY"):
        for source in rest.split()[:-1]:
            assert (ROOT / source).is_file()
            assert source in allowed()


def test_the_build_gets_the_package_and_nothing_else() -> None:
    package = set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"])
    metadata = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert allowed() == package | metadata | {"constraints.txt", "docker/requirements.py"}
    assert all((ROOT / path).exists() for path in allowed())


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_images_run_as_a_numbered_user(image: Path) -> None:
    last = [rest for word, rest in instructions(image) if word == "USER"][-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last)
    assert f"--uid {last.partition(':')[0]}" in " ".join(arguments_of(image, "RUN"))


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_images_check_their_health_and_run_datamerge(image: Path) -> None:
    (health,) = arguments_of(image, "HEALTHCHECK")
    assert json.loads(health.partition("CMD ")[2])
    assert [json.loads(text) for text in arguments_of(image, "ENTRYPOINT")] == [["datamerge"]]


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_dependencies_are_cached_apart_from_the_code(image: Path) -> None:
    lines = [f"{word} {rest}" for word, rest in instructions(image)]
    order = ["COPY constraints.txt", "TORCH_INDEX}", "COPY pyproject.toml", "--requirement", "target=/source"]
    found = [next(i for i, line in enumerate(lines) if text in line) for text in order]
    assert found == sorted(found)
    assert all(
        "--constraint constraints.txt" in line for line in lines if "pip install" in line and "/source" not in line
    )


def test_images_share_the_layers_down_to_torch() -> None:
    shared = []
    for image in IMAGES:
        lines = instructions(image)
        torch = next(i for i, (_, rest) in enumerate(lines) if "TORCH_INDEX}" in rest)
        shared.append(lines[: torch + 1])
        # An argument is part of every later step: other extras must not install torch again.
        assert not [rest for word, rest in shared[-1] if "EXTRAS" in rest]
        # Only from that index: with PyPI as a second one, its failure would go unnoticed.
        assert '--no-deps --index-url "${TORCH_INDEX}" torch torchvision' in lines[torch][1]
    assert shared[0] == shared[1]


def test_extras_exist_and_are_resolved() -> None:
    known = PROJECT["project"]["optional-dependencies"]
    requirements = runpy.run_path(str(DOCKER / "requirements.py"))["requirements"]
    used = [
        re.sub("EXTRAS=", "", rest) for image in IMAGES for rest in arguments_of(image, "ARG") if "EXTRAS" in rest
    ]
    used += [build["args"]["EXTRAS"] for build in BUILDS.values()]
    assert len(used) == 2 * len(IMAGES)
    for extras in used:
        assert set(extras.split(",")) <= set(known)
        found = requirements(PROJECT["project"], extras.split(","))
        assert not [line for line in found if line.startswith("datamerge")]
        assert set(PROJECT["project"]["dependencies"]) <= set(found)
        # All services write to S3, which needs a driver.
        assert any(line.startswith("s3fs") for line in found)
    assert any(line.startswith("ray[default]>=") for line in requirements(PROJECT["project"], ["demo"]))
    with pytest.raises(SystemExit, match="s4"):
        requirements(PROJECT["project"], ["merge", "s4"])


def test_each_image_is_built_by_one_service_and_pulled_by_none() -> None:
    built = [service["image"] for service in SERVICES.values() if "build" in service]
    assert sorted(built) == sorted({service["image"] for _, service in ours()})
    assert all(service["pull_policy"] == "never" for _, service in ours())
    assert sorted(build["dockerfile"] for build in BUILDS.values()) == [f"docker/{image.name}" for image in IMAGES]
    assert {(DOCKER / build["context"]).resolve() for build in BUILDS.values()} == {ROOT}


def test_commands_of_services_are_valid() -> None:
    seen = set()
    for _, service in ours():
        program, *rest = entry(service)
        seen.add(program)
        if program == "ray" and "--" in rest:
            program, *rest = rest[rest.index("--") + 1 :]
        if program == "datamerge":
            parse(rest)
        elif program == "python":
            (mount,) = [volume for volume in service["volumes"] if volume.startswith("./")]
            assert (DOCKER / mount.split(":")[0]).is_file()
            assert mount.split(":")[1] == rest[0]
    assert seen == {"datamerge", "python", "ray", "tensorboard"}


def test_services_wait_for_services_and_share_volumes() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            assert name != other
            one_of = {"service_healthy", "service_completed_successfully", "service_started"}
            assert how["condition"] in one_of
            if how["condition"] == "service_healthy":
                assert "test" in SERVICES[other]["healthcheck"]
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source.startswith("./") or source in COMPOSE["volumes"]


def test_services_of_the_demo_use_each_others_results() -> None:
    digits, merge, train, evaluate = (entry(SERVICES[name]) for name in ("digits", "merge", "trainer", "evaluate"))
    submit, merge = merge[: merge.index("--")], merge[merge.index("--") + 1 :]
    assert submit == ["ray", "job", "submit", "--address", "http://head:8265"]
    source, artifact = merge[2:4]
    assert source == f"{digits[2]}/train"
    assert artifact == train[2]
    assert artifact.startswith("s3://")
    assert train[3] in evaluate
    encoders = {word for line in (merge, train, evaluate) for word in line if word.startswith("python:")}
    assert len(encoders) == 1
    head = SERVICES["head"]["command"].split()
    assert f"head:{head[head.index('--port') + 1]}" in SERVICES["worker"]["command"].split()
    assert merge[-2:] == ["--ray-address", "auto"]


def test_ray_nodes_are_restarted_after_a_failed_start() -> None:
    # Ray's agent answers before `ray start` has succeeded; compose ends if the head ends or is unhealthy.
    for name in ("head", "worker"):
        assert SERVICES[name]["restart"] == "on-failure"
        assert "ray_current_cluster &&" in SERVICES[name]["healthcheck"]["test"][1]
    assert SERVICES["head"]["depends_on"] == {"digits": {"condition": "service_completed_successfully"}}


def test_ports_are_open_to_this_machine_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_rayjob_is_valid() -> None:
    job = yaml.safe_load((DOCKER / "rayjob.yaml").read_text("utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    program, *rest = shlex.split(job["spec"]["entrypoint"])
    assert program == "datamerge"
    parse(rest)
    cluster = job["spec"]["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1]
    assert all(isinstance(value, str) for group in (head, workers) for value in group["rayStartParams"].values())
    for group in (head, workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"] == {"runAsNonRoot": True}
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
        assert container["resources"]["limits"] == container["resources"]["requests"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


def test_the_slurm_script_is_valid() -> None:
    file = DOCKER / "slurm.sbatch"
    subprocess.run(["bash", "-n", file], check=True)
    text = file.read_text("utf-8").replace("\\\n", " ")
    defaults = dict(re.findall(r'<<< "\$\{(MERGE|TRAIN):-(.+?)\}"', text))
    parse(["merge", "source", "artifact", *defaults["MERGE"].split(), "--ray-address", "head:20000"])
    parse(["train", "artifact", "run", *defaults["TRAIN"].split()])
    assert 'datamerge merge "$source" "$artifact" "${merge[@]}" --ray-address' in text
    assert '-m datamerge train "$artifact" "$run" "${train[@]}"' in text


@pytest.mark.parametrize("line", ["merge a b --memebrs 3", "trian a b", "train a b --arm avgs"])
def test_wrong_commands_are_found(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(line.split())


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
@pytest.mark.parametrize(("index", "expected"), [("whl/cpu", []), ("whl/cu130", ["update", "install"])])
def test_images_for_gpus_have_the_compiler_that_torch_compile_calls(
    image: Path, tmp_path: Path, index: str, expected: list[str]
) -> None:
    """The step is run with a script that records its arguments in place of apt-get."""
    (step,) = (rest for rest in arguments_of(image, "RUN") if "gcc" in rest)
    log = tmp_path / "log"
    (tmp_path / "apt-get").write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    (tmp_path / "apt-get").chmod(0o755)
    (tmp_path / "rm").symlink_to("/bin/true")
    environment = {"PATH": f"{tmp_path}:/bin:/usr/bin", "TORCH_INDEX": f"https://download.pytorch.org/{index}"}
    subprocess.run(["sh", "-c", step], env=environment, check=True)
    lines = log.read_text().splitlines() if log.exists() else []
    assert [line.split()[0] for line in lines] == expected
    if lines:
        assert {"gcc", "libc6-dev"} <= set(lines[-1].split())


def test_batches_fit_the_shared_memory_of_the_trainer() -> None:
    """128 groups of a mean and a variance of 224 x 224 pixels, two batches for each of four workers."""
    needed = 128 * 2 * 3 * 224 * 224 * 4 * 2 * 4
    for name in ("trainer", "evaluate"):
        (gigabytes,) = re.findall(r"^(\d+)g$", str(SERVICES[name]["shm_size"]))
        assert int(gigabytes) * 1024**3 > needed
