"""A run's directory on a network file system: its lock, files, checkpoints; a score cache that two nodes fill."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from remit_megatron.runtime.files import read_whole
from tests.image.small_run import main as write_small_run
from tests.integration.test_resume import losses, tensors
from tests.network_files.conftest import Node
from tests.unit.reference.test_cache import DATASET, losses_of, tokens_of
from tests.unit.reference.test_cache import make as make_cache
from tests.unit.runtime.test_locks import HOLD

HOLDER = f"""
import sys
from pathlib import Path
from remit_megatron.run.directory import RunLock
from remit_megatron.runtime.errors import UserError
take = lambda: RunLock(Path(sys.argv[1]))
{HOLD}"""


def says(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def ended(*children: subprocess.Popen[str], code: int = 0) -> list[str]:
    """What they have said, standard error last; they have ended well."""
    said = []
    for child in children:
        out, errors = child.communicate(timeout=600)
        assert child.returncode == code, out + errors
        said.append(out + errors)
    return said


def test_the_lock_of_a_run(nodes):
    """A live holder on another node is named; one that was killed there does not hold it."""
    first = nodes[0].start("-c", HOLDER, nodes[0].files / "run")
    assert says(first) == "held"
    second = nodes[1].start("-c", HOLDER, nodes[1].files / "run")
    assert f"in use by process {first.pid} on n1" in says(second)
    ended(second, code=2)
    first.kill()
    first.wait()
    begun = time.monotonic()
    third = nodes[1].start("-c", HOLDER, nodes[1].files / "run")
    assert says(third) == "held"
    assert time.monotonic() - begun < 120
    (said,) = ended(third)
    assert "was last held by process" in said and "watching" in said
    fourth = nodes[0].start("-c", HOLDER, nodes[0].files / "run")
    assert says(fourth) == "held", "given back by another node"
    ended(fourth)


def test_of_many_that_come_at_once_one_has_the_lock(nodes):
    nodes[0].files.joinpath("run").mkdir()
    children = [node.start("-c", HOLDER, node.files / "run") for node in nodes * 4]
    answers = [says(child).partition(":")[0] for child in children]
    assert sorted(answers) == ["held"] + ["refused"] * 7
    for child in children:
        child.communicate(timeout=60)


WRITER = """
import sys
from pathlib import Path
from remit_megatron.runtime.files import write_atomic
path = Path(sys.argv[1])
for number in range(200):
    write_atomic(path, bytes([number]) * 50_000)
"""
ONCE = """
import os, sys
from pathlib import Path
from remit_megatron.runtime.files import create_once
folder, name = Path(sys.argv[1]), sys.argv[2]
print(sum(create_once(folder / str(n), lambda file: os.write(file, name.encode() * 1000)) for n in range(100)))
"""


def test_a_file_is_replaced_whole(nodes):
    """A reader on another node sees one of the contents, never a part or none."""
    path = nodes[0].files / "file"
    path.write_bytes(b"\xff" * 50_000)
    there = nodes[1].files / "file"
    writer, seen = nodes[0].start("-c", WRITER, path), set()
    while writer.poll() is None:
        content = read_whole(there)
        assert len(content) == 50_000 and len(set(content)) == 1
        seen.add(content[0])
    ended(writer)
    assert len(seen) > 3
    assert [entry.name for entry in nodes[0].files.iterdir()] == ["file"]


def test_of_two_nodes_that_make_a_file_one_does(nodes):
    makers = [node.start("-c", ONCE, node.files, node.name) for node in nodes]
    counts = [int(said) for said in ended(*makers)]
    assert sum(counts) == 100
    for reader in nodes:
        made = [(reader.files / str(number)).read_text() for number in range(100)]
        assert [made.count(node.name * 1000) for node in nodes] == counts


FILL = """
import sys
from pathlib import Path
from tests.unit.reference.test_cache import DATASET, losses_of, make, tokens_of
start, samples = int(sys.argv[2]), int(sys.argv[3])
with make(Path(sys.argv[1]), samples=samples) as cache:
    print("ready", flush=True)
    sys.stdin.readline()
    for sample in range(start, samples, 2):
        cache.write(DATASET, sample, tokens_of(sample), losses_of(sample))
        if sample % 50 < 2:
            cache.flush()
"""


def test_a_score_cache_that_two_nodes_fill(nodes):
    """Neighboring samples, so that both write into every page."""
    samples = 1000
    writers = [node.start("-c", FILL, node.files / "cache", n, samples) for n, node in enumerate(nodes)]
    assert [says(writer) for writer in writers] == ["ready", "ready"]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    ended(*writers)
    for node in nodes:
        with make_cache(node.files / "cache", samples=samples) as cache:
            assert cache.completeness(DATASET).all()
            for sample in range(samples):
                found = cache.read(DATASET, sample, tokens_of(sample))
                assert found is not None and np.abs(found - losses_of(sample)).max() <= 2**-12
            assert cache.damaged == 0


STEPS = 40


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, list[str]]:
    """The run that nobody disturbs, on a local disk; and the words of its command."""
    from tests.integration.conftest import write

    folder = tmp_path_factory.mktemp("straight")
    write_small_run(folder)
    config = json.loads((folder / "run.yaml").read_text())
    config["megatron"] |= {"tensor_model_parallel_size": 1, "train_iters": STEPS, "save_interval": 4}
    path = write(folder / "run.yaml", config)
    node = Node("n0", folder, Path("/proc/sys/kernel/random/boot_id"))
    ended(node.remit("train", path))
    return folder / "run", ["train", str(path)]


def test_a_run_that_is_killed_goes_on_on_the_other_node(nodes, straight):
    run_dirs = [node.files / "run" for node in nodes]
    local, words = straight
    first = nodes[0].remit(*words, f"run_dir={run_dirs[0]}")
    metrics = run_dirs[0] / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 10:
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.kill()
    first.communicate()
    (said,) = ended(nodes[1].remit(*words, f"run_dir={run_dirs[1]}"))
    assert "resuming at step" in said
    for run_dir in run_dirs:
        assert losses(run_dir) == losses(local)
        found, expected = tensors(run_dir, STEPS), tensors(local, STEPS)
        assert set(found) == set(expected) and len(found) > 20
        assert all(found[name].equal(expected[name]) for name in expected)


def test_two_nodes_score_into_one_cache(nodes, straight):
    """Side by side, as an array of jobs does; every score is verified from the other node."""
    _, words = straight
    rest = [f"reference.cache_dir={node.files / 'cache'}" for node in nodes]
    run_dirs = [f"run_dir={node.files / node.name}" for node in nodes]
    command = ["score", *words[1:]]
    ended(*(node.remit(*command, cache, run) for node, cache, run in zip(nodes, rest, run_dirs, strict=True)))
    ended(nodes[0].remit(*command, rest[0], run_dirs[0], "--verify", "64"))
    (said,) = ended(nodes[1].remit("train", *words[1:], rest[1], run_dirs[1], "reference.source=cache"))
    assert f"{STEPS}/{STEPS}" in said
