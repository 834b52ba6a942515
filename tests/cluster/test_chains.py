"""Jobs that wait for others: a chain under one name, a chain of stages of which one fails, an array and its merge."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cluster.slurm import REPOSITORY, Cluster, Job
from tests.integration.conftest import write
from tests.tiny import write_documents


def test_singleton_chain(cluster: Cluster, config_for, tmp_path) -> None:
    """Three jobs of one run; each goes on where the one before it stopped, never two at once."""
    config = config_for(tmp_path / "run", tensor_model_parallel_size=1, train_iters=9, save_interval=100)
    path = write(tmp_path / "run.yaml", config)
    jobs = [
        cluster.submit(
            "train",
            path,
            f"megatron.exit_interval={interval}",
            log=tmp_path / f"{interval}.out",
            nodes=1,
            tasks=1,
            options=("--job-name=chain", "--dependency=singleton", "--no-requeue"),
        )
        for interval in (3, 6, 9)
    ]
    # Requeueing is off, as on some clusters: the next job of the chain takes the place of a requeue.
    ends = [job.end() for job in jobs]
    assert ends == [("FAILED", 75), ("FAILED", 75), ("COMPLETED", 0)], [job.said() for job in jobs]
    assert "could not be requeued; submit it again to go on" in jobs[0].said()
    assert "resuming at step 3" in jobs[1].said() and "resuming at step 6" in jobs[2].said()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in metrics] == list(range(1, 10))


def test_a_stage_that_fails_stops_what_waits_for_it(cluster: Cluster, config_for, tmp_path) -> None:
    """Train, then score, then train, of which the first is refused: the others never start, and Slurm says why."""
    config = config_for(tmp_path / "run", tensor_model_parallel_size=1)
    config["data"]["train"] = str(tmp_path / "nothing")
    path = write(tmp_path / "run.yaml", config)
    waits = ("--kill-on-invalid-dep=yes",)
    first = cluster.submit("train", path, log=tmp_path / "1.out", options=("--hold",), nodes=1, tasks=1)
    second = cluster.submit(
        "score", path, log=tmp_path / "2.out", options=(f"--dependency=afterok:{first.id}", *waits), nodes=1, tasks=1
    )
    third = cluster.submit(
        "train", path, log=tmp_path / "3.out", options=(f"--dependency=afterok:{second.id}", *waits), nodes=1, tasks=1
    )
    cluster.call("scontrol", "release", first.id)
    assert first.end() == ("FAILED", 2)
    refused = [line for line in first.said().splitlines() if line.startswith("0: error: ") and "nothing" in line]
    assert len(refused) == 1 and "exit code 2: starting again would end the same way" in first.said()
    for job in (second, third):
        assert job.end()[0] == "CANCELLED"
        assert job.fields()["Reason"] in ("DependencyNeverSatisfied", "Dependency"), job.fields()
        assert not job.log.exists(), "it never started"


def test_a_flywheel_of_which_a_stage_fails(cluster: Cluster, config_for, tmp_path) -> None:
    """``remit flywheel --slurm``: train over two nodes, a gate, and what waits for the gate. The gate fails; what waits
    does not start, and one line says why. Once it is mended the same command goes on behind what is done."""
    config = write(tmp_path / "run.yaml", config_for(tmp_path / "unused", train_iters=2, save_interval=2))
    code = tmp_path / "code"
    code.write_text("70")
    stages = {
        "midtrain": {"kind": "train", "config": str(config), "slurm": {"nodes": 2}},
        "gate": {
            "kind": "command",
            "words": ["sh", "-c", f"touch {{output}}; exit $(cat {code})"],
            "after": ["midtrain"],
        },
        "copy": {
            "kind": "command",
            "words": ["cp", "-r", "${stage:midtrain}", "{output}"],
            "produces": "model",
            "after": ["gate"],
        },
    }
    slurm = {"nodes": 1, "ntasks-per-node": 1, "gpus-per-node": 1, "cpus-per-task": 1, "time": 60}
    run_dir = tmp_path / "flywheel"
    path = write(tmp_path / "flywheel.yaml", {"run_dir": str(run_dir), "slurm": slurm, "stages": stages})
    remit = REPOSITORY / ".venv" / "bin" / "remit"

    def submit(*words: str) -> dict[str, Job]:
        cluster.call(remit, "flywheel", path, "--slurm", *words)
        jobs = json.loads((run_dir / "jobs.json").read_text())
        return {
            name.removeprefix("round1/"): Job(cluster, job["id"], run_dir / f"slurm-{job['id']}.out")
            for name, job in jobs.items()
        }

    jobs = submit()
    assert jobs["midtrain"].end() == ("COMPLETED", 0), jobs["midtrain"].said()
    assert jobs["gate"].end() == ("FAILED", 70), jobs["gate"].said()
    assert jobs["copy"].end()[0] == "CANCELLED" and not jobs["copy"].log.exists(), "it never started"
    why = "round1/gate failed with 70: what needs it will not run: round1/copy"
    assert jobs["gate"].said().count(why) == 1, jobs["gate"].said()
    status = cluster.call(remit, "flywheel", "status", path)
    assert "needs round1/gate, which is failed" in status, status

    code.write_text("0")
    again = submit("--retry")
    assert again["midtrain"].id == jobs["midtrain"].id, "which is done"
    assert again["copy"].end() == ("COMPLETED", 0), again["gate"].said() + again["copy"].said()
    assert (run_dir / "report.html").exists(), again["copy"].said()


def test_data_by_an_array_and_one_merge(cluster: Cluster, material, tmp_path) -> None:
    """Five files over three jobs, then one data set: the bytes of a single build."""
    from remit_megatron.data.build import build_dataset

    files = [write_documents(tmp_path / f"{n}.jsonl", count=30 + n, seed=50 + n) for n in range(5)]
    output = tmp_path / "data" / "corpus"
    words = (output, "--tokenizer", material["tokenizer"], "--input", *files, "--workers", 1)
    array = cluster.submit(
        "data_build", *words, log=tmp_path / "build-%a.out", options=("--array=0-2",), nodes=1, tasks=1
    )
    merge = cluster.submit(
        "data_merge",
        output,
        log=tmp_path / "merge.out",
        options=(f"--dependency=afterok:{array.id}", "--kill-on-invalid-dep=yes"),
        nodes=1,
        tasks=1,
    )
    assert merge.end() == ("COMPLETED", 0), merge.said() + "".join(
        path.read_text() for path in tmp_path.glob("build-*.out")
    )
    whole = build_dataset(files, material["tokenizer"], tmp_path / "whole")
    assert whole.documents == 160
    for kind in ("bin", "idx", "json"):
        assert Path(f"{output}.{kind}").read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()


def test_scripts_are_taken_by_slurm(cluster: Cluster, tmp_path) -> None:
    """Every batch script, with its own options, on a partition that has what it asks for, is one that sbatch takes."""
    for script in sorted((REPOSITORY / "scripts" / "slurm").glob("*.sbatch")):
        cluster.call(
            "sbatch", "--test-only", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", script, "x"
        )
