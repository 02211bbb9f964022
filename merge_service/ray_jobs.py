"""A merge as a job of somebody else's cluster, through the Ray Jobs API."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import time
from collections.abc import Sequence

from merge_service.retry import first_line
from storage_schemas import ConfigError

# How long a new cluster may take until it accepts jobs.
START_SECONDS = 60


def submit_job(address: str, command: Sequence[str]) -> int:
    """Run a command on a cluster through the Ray Jobs API, show its log, and return its exit code: 0 or 1.

    The log goes to stderr, the line with the outcome as JSON to stdout.

    Raises:
        ConfigError: nobody answers at the address.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    end = time.monotonic() + START_SECONDS
    while True:
        try:
            client = JobSubmissionClient(address)
            job = client.submit_job(entrypoint=shlex.join(command))
            break
        except (ConnectionError, RuntimeError, ValueError) as error:
            # A head that has just started has no agent for jobs yet.
            if "try again later" not in str(error) or time.monotonic() > end:
                raise ConfigError(
                    f"submit {address!r}: expected the dashboard of a Ray cluster such as http://head:8265, found "
                    f"none ({first_line(error)})"
                ) from None
        time.sleep(2)
    sys.stderr.write(f"submitted {job}; it goes on if this command ends: ray job logs --address {address} -f {job}\n")

    async def show() -> None:
        rest = ""
        async for text in client.tail_job_logs(job):
            # Pieces of the log may end within a line.
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                _show(f"{line}\n")
        _show(rest)

    asyncio.run(show())
    while not client.get_job_status(job).is_terminal():
        time.sleep(1)
    return 0 if client.get_job_status(job) == JobStatus.SUCCEEDED else 1


def _show(line: str) -> None:
    """Ray mixes both streams of a job into its log; this tells them apart again."""
    stream = sys.stdout if _is_outcome(line) else sys.stderr
    stream.write(line)
    stream.flush()


def _is_outcome(line: str) -> bool:
    try:
        facts = json.loads(line)
    except ValueError:
        return False
    return isinstance(facts, dict) and "artifact" in facts
