"""``score.sbatch`` as an array that fills one cache, one of its jobs killed; then a run that reads it."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster, Job, environment_of
from tests.integration.conftest import write
from tests.tiny import write_documents

CORPORA = 6  # each is a piece of work that a job leases


@pytest.fixture(scope="module")
def corpora(material, tmp_path_factory) -> list[list]:
    from remit_megatron.data.build import build_dataset

    root = tmp_path_factory.mktemp("corpora")
    for number in range(CORPORA):
        text = write_documents(root / f"{number}.jsonl", count=1500, seed=20 + number)
        build_dataset([text], tokenizer=material["tokenizer"], output=root / str(number))
    return [[1.0, str(root / str(number))] for number in range(CORPORA)]


def holders(cache: Path) -> list[int]:
    """Processes that hold a piece of the work."""
    found = []
    for lease in (cache / "leases").glob("[!.]*"):
        with suppress(OSError, ValueError):
            found.append(int(json.loads(lease.read_text()).get("process", 0)))
    return found


def test_four_jobs_fill_one_cache(cluster: Cluster, config_for, corpora, tmp_path) -> None:
    cache = tmp_path / "cache"
    config = config_for(tmp_path / "run", tensor_model_parallel_size=1, train_iters=30)
    config["data"]["train"] = corpora
    config["reference"] |= {"cache_dir": str(cache)}
    path = write(tmp_path / "run.yaml", config)
    array = cluster.submit(
        "score",
        path,
        "--all",
        log=tmp_path / "score-%a.out",
        nodes=1,
        tasks=1,
        options=("--array=0-3",),
        variables={"REMIT_CRASHES": "0"},
    )
    jobs = [Job(cluster, f"{array.id}_{number}", tmp_path / f"score-{number}.out") for number in range(4)]

    def killed() -> Job | None:
        """The job whose process holds a piece first, and is killed for it."""
        for pid in holders(cache):
            with suppress(OSError):
                number = int(environment_of(pid)[b"SLURM_ARRAY_TASK_ID"])
                os.kill(pid, signal.SIGKILL)
                return jobs[number]
        return None

    victim = jobs[0].until(killed, name="job that holds a piece")
    ends = {job.id: job.end() for job in jobs}
    assert ends.pop(victim.id) == ("FAILED", 137), victim.said()
    assert set(ends.values()) == {("COMPLETED", 0)}, "\n".join(job.said() for job in jobs)

    train = cluster.submit(
        "train",
        path,
        "reference.source=cache",
        "reference.on_missing=refuse",
        log=tmp_path / "train.out",
        nodes=2,
        tasks=1,
    )
    assert train.end() == ("COMPLETED", 0), train.said()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 30 and all(record["weight_std"] > 0 for record in records)
