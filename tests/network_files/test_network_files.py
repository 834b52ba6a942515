"""A run's directory on a network file system: its lock, files, checkpoints; a score cache that two nodes fill."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

import pytest

from tests.image.small_run import main as write_small_run
from tests.integration.test_resume import losses, tensors
from tests.network_files.conftest import ROOT, Node, Process
from tests.unit.runtime.test_locks import HOLD

HOLDER = f"""
import sys
from pathlib import Path
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.locks import DirectoryLock
take = lambda: DirectoryLock(Path(sys.argv[1]))
{HOLD}"""


def says(child: Process) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def ended(*children: Process, code: int = 0) -> list[str]:
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
    assert f"in use by process {first.number} on n1" in says(second)
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


READER = """
import sys
from pathlib import Path
from remit_megatron.runtime.files import read_whole
seen = []
print("ready", flush=True)
while not seen or seen[-1] != 199:
    content = read_whole(Path(sys.argv[1]))
    assert len(content) == 50_000 and len(set(content)) == 1, (len(content), set(content))
    if content[0] not in seen[-1:]:
        seen.append(content[0])
print(*seen)
"""
MADE = """
import sys
from pathlib import Path
made = [(Path(sys.argv[1]) / str(n)).read_text() for n in range(100)]
print(*(made.count(name * 1000) for name in ("n1", "n2")))
"""


def test_a_file_is_replaced_whole(nodes):
    """A reader on another node sees one of the contents, never a part or none, and never an older one after a newer."""
    (nodes[0].files / "file").write_bytes(b"\xff" * 50_000)
    reader = nodes[1].start("-c", READER, nodes[1].files / "file")
    assert says(reader) == "ready"
    writer = nodes[0].start("-c", WRITER, nodes[0].files / "file")
    said, _ = ended(reader, writer)
    seen = [int(number) for number in said.split()]
    assert len(seen) >= (2 if nodes[0].boot is None else 4)  # NFS looks for the new file every few seconds
    assert seen == sorted(seen, key=lambda number: number % 255)
    assert os.listdir(nodes[0].files) == ["file"]


def test_of_two_nodes_that_make_a_file_one_does(nodes):
    makers = [node.start("-c", ONCE, node.files, node.name) for node in nodes]
    counts = [int(said) for said in ended(*makers)]
    assert sum(counts) == 100
    for said in ended(*(node.start("-c", MADE, node.files) for node in nodes)):
        assert [int(number) for number in said.split()] == counts


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


WHOLE = """
import sys
from pathlib import Path
import numpy as np
from tests.unit.reference.test_cache import DATASET, losses_of, make, tokens_of
samples = int(sys.argv[2])
with make(Path(sys.argv[1]), samples=samples) as cache:
    print(int(cache.completeness(DATASET).sum()))
    for sample in range(samples):
        found = cache.read(DATASET, sample, tokens_of(sample))
        assert found is not None and np.abs(found - losses_of(sample)).max() <= 2**-12, sample
    assert cache.damaged == 0
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
    checks = [node.start("-c", WHOLE, node.files / "cache", samples) for node in nodes]
    assert ended(*checks) == [f"{samples}\n"] * 2


STEPS = 40


@pytest.fixture(scope="session")
def straight(kind: str) -> tuple[Path, list[str]]:
    """The run that nobody disturbs, on a local disk; and the words of its command. One for all kinds."""
    from tests.integration.conftest import write

    if kind.startswith("nfs"):
        pytest.skip("ssh to user-mode-linux is lost before a run of minutes ends")
    folder = Path(ROOT or "") / "straight"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            write_small_run(folder)
            config = json.loads((folder / "run.yaml").read_text())
            config["megatron"] |= {"tensor_model_parallel_size": 1, "train_iters": STEPS, "save_interval": 4}
            path = write(folder / "run.yaml", config)
            ended(Node("n0", folder, Path("/proc/sys/kernel/random/boot_id")).remit("train", path))
            (folder / "done").touch()
    return folder / "run", ["train", str(folder / "run.yaml")]


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
