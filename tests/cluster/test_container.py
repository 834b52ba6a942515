"""``train.sbatch`` with its container flags, which a small SPANK plugin takes and records in place of pyxis."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cluster.slurm import REPOSITORY, Cluster
from tests.integration.conftest import write

SOURCE = Path(__file__).with_name("spank_container.c")


@pytest.fixture
def pyxis(cluster: Cluster, tmp_path: Path):
    """The file that receives the flags of srun."""
    library = tmp_path / "spank_container.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-o", library, SOURCE], check=True)
    stack = cluster.folder / "plugstack.conf"
    stack.write_text(f"required {library}\n")
    yield tmp_path / "flags"
    stack.write_text("")


def test_flags_of_the_container(cluster: Cluster, config_for, pyxis: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.sqsh"
    image.touch()
    path = write(tmp_path / "run.yaml", config_for(tmp_path / "run", train_iters=2, tensor_model_parallel_size=1))
    job = cluster.submit(
        "train",
        path,
        log=tmp_path / "job.out",
        nodes=1,
        tasks=1,
        variables={
            "REMIT_CONTAINER": str(image),
            "REMIT_MOUNTS": "/data:/data",
            "REMIT_SPANK_RECORD": str(pyxis),
        },
    )
    assert job.end() == ("COMPLETED", 0), job.said()
    assert "step 2/2" in job.said()
    assert sorted(pyxis.read_text().splitlines()) == [
        f"--container-image={image}",
        f"--container-mounts={REPOSITORY}:{REPOSITORY},/data:/data",
        f"--container-workdir={REPOSITORY}",
    ]
