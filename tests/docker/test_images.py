"""The container files name things that exist: files, extras, options of the commands, services."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from datamerge import cli

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
IMAGES = ("merge.Dockerfile", "trainer.Dockerfile")


def _instructions(name: str) -> list[tuple[str, str]]:
    text = (DOCKER / name).read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def _compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return found


def _check_command(words: list[str]) -> None:
    """Whether the command takes these options; nothing is run."""
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None, words
    command.make_context(words[0], words[1:])


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_runs_as_a_user_and_says_how_it_is(name: str) -> None:
    instructions = _instructions(name)
    users = [value for kind, value in instructions if kind == "USER"]
    assert users == ["datamerge"]
    after = [kind for kind, _ in instructions][[kind for kind, _ in instructions].index("USER") :]
    assert not {"COPY", "RUN", "ADD"} & set(after)
    assert {"HEALTHCHECK", "ENTRYPOINT"} <= {kind for kind, _ in instructions}


@pytest.mark.parametrize("name", IMAGES)
def test_what_an_image_copies_and_installs_exists(name: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for kind, value in _instructions(name):
        if kind == "COPY":
            assert all((ROOT / source).exists() for source in value.split()[:-1])
        if kind == "ARG" and value.startswith("EXTRAS="):
            assert set(value.removeprefix("EXTRAS=").split(",")) <= extras.keys()
        if kind == "RUN" and value.startswith("mkdir"):
            made = value.split("&&")[0].split()[1:]
            assert set(made) == {item for item in build["only-include"] if not item.endswith(".py")}


def test_the_two_images_share_their_layers() -> None:
    first, second = ([row for row in _instructions(name) if row[0] in ("RUN", "COPY")] for name in IMAGES)
    assert first == second


def test_services_start_in_an_order_that_exists() -> None:
    services = _compose()["services"]
    for name, service in services.items():
        for other, condition in service.get("depends_on", {}).items():
            assert other in services
            if condition["condition"] == "service_healthy":
                disabled = services[other].get("healthcheck", {}).get("disable", False)
                assert not disabled, f"{name} waits for the health of {other}"
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in _compose()["volumes"]
        if "build" in service:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).exists()


@pytest.mark.parametrize("service", ["merge", "trainer"])
def test_the_commands_of_the_demo_exist(service: str) -> None:
    _check_command(shlex.split(_compose()["services"][service]["command"]))


def test_the_command_of_the_ray_job_exists() -> None:
    job = yaml.safe_load((DOCKER / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[0] == "datamerge"
    _check_command(words[1:])
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes


def test_the_slurm_script_parses_and_its_commands_exist() -> None:
    script = DOCKER / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text().replace("\\\n", " ")
    commands = re.findall(r"datamerge ((?:merge|train) [^&\n]*)", text)
    assert len(commands) == 2
    for command in commands:
        _check_command(shlex.split(command))
