"""The package as ``pip install`` leaves it: archive, wheel, an environment of its own, no repository in sight."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOREIGN = "raise SystemExit('the foreign module ran')\n"


def clean_environment() -> dict[str, str]:
    """Without what would show Python the repository, or say that this is a rank."""
    dropped = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "REMIT_SAID")
    return {key: value for key, value in os.environ.items() if key not in dropped}


def python(*words: object, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", *map(str, words)], cwd=cwd, env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """(source archive, wheel): the wheel is built from the unpacked archive, so that this has what is needed."""
    folder = tmp_path_factory.mktemp("archives")
    python("-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=REPOSITORY)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    python("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=folder / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@dataclass
class Installed:
    """An environment with the wheel: ``bin/remit``, its site-packages, and an empty folder to work in."""

    root: Path
    site: Path
    work: Path

    def command(self, *words: object, module: bool = False) -> list[str]:
        start = [self.root / "bin/python", "-m", "remit_megatron"] if module else [self.root / "bin/remit"]
        return [*map(str, start), *map(str, words)]

    def remit(self, *words: object, module: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words, module=module),
            cwd=self.work,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=240,
        )


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory) -> Installed:
    """Nothing is in the environment but the wheel. Its dependencies are those of the tests, whose site-packages follow
    on the path as a plain folder: the ``.pth`` file in it that leads to the repository is not read there."""
    root = tmp_path_factory.mktemp("environment")
    python("-m", "venv", "--without-pip", root, cwd=root)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(root)}))
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    python("-m", "pip", "--python", root / "bin/python", "install", *options, archives[1], cwd=root)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = root / "work"
    work.mkdir()
    return Installed(root, site, work)


def files_below(*folders: str) -> set[str]:
    """Paths of the repository that a package must have: all that is in a folder but what Python leaves there."""
    return {
        str(path.relative_to(REPOSITORY))
        for folder in folders
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_archive_and_wheel_have_everything(archives):
    sdist, wheel = archives
    with tarfile.open(sdist) as archive:
        top = sdist.name.removesuffix(".tar.gz")
        sources = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    needed = files_below("remit_megatron", "patches", "configs")
    assert needed | {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "scripts/setup.sh"} <= sources
    assert not {name for name in sources if name.split("/")[0] in {"runs", "data", "checkpoints", ".venv", ".git"}}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        about = archive.read(metadata).decode()
    info = metadata.removesuffix("METADATA")
    inside = {f"remit_megatron/{name}" if name.startswith("configs/") else name for name in needed}
    assert {name for name in names if not name.startswith(info)} == inside
    assert f"{info}licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in about
    assert "Description-Content-Type: text/markdown" in about and "# remit_megatron" in about


def test_the_repository_is_out_of_sight(installed):
    """Else nothing below would prove anything."""
    code = (
        "import json, sys, importlib.metadata as m, remit_megatron, patches, remit_megatron.runtime.installed as i\n"
        "print(json.dumps([sys.path, [remit_megatron.__file__, patches.__file__, str(i.shipped_configs()), "
        "str(i.find_config('configs/runs/kd.yaml')), str(m.distribution('remit-megatron').locate_file(''))]]))"
    )
    done = subprocess.run(
        [installed.root / "bin/python", "-P", "-c", code],
        cwd=installed.work,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    path, places = json.loads(done.stdout)
    assert str(REPOSITORY) not in path
    assert [Path(place) for place in places] == [
        installed.site / name
        for name in (
            "remit_megatron/__init__.py",
            "patches/__init__.py",
            "remit_megatron/configs",
            "remit_megatron/configs/runs/kd.yaml",
            "",
        )
    ]


def test_help_and_doctor(installed):
    """The doctor through ``python -m``, with a module of the name ``patches`` where that puts it first."""
    done = installed.remit("--help")
    assert done.returncode == 0 and "quickstart" in done.stdout, done.stderr
    place = installed.work / "patches.py"
    place.write_text(FOREIGN)
    try:
        done = installed.remit("doctor", module=True)
    finally:
        place.unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("training works here\n")
    assert re.search(r"^  cpu_device +in force: ", done.stdout, re.MULTILINE)
    remarks = re.findall(r"^remark: (.*)$", done.stdout, re.MULTILINE)
    assert remarks == [
        f"patches: found {place}, which is not remit's; it is left alone, and remit uses {installed.site / 'patches'}"
    ]


def test_a_dry_run_of_a_shipped_configuration(installed):
    """It names its model (``olmo2_1b``) and starts from another file; both come from the wheel."""
    own = installed.site / "remit_megatron/configs/models/only_here.yaml"
    own.write_text("base: olmo2_1b.yaml\n")
    run = "configs/runs/olmo2_1b_remit_paper.yaml"
    done = installed.remit("train", run, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "model: olmo2_1b\n" in done.stdout and "1,484,916,736" in done.stdout and "adam_beta2: 0.95" in done.stdout
    shipped = installed.site / "remit_megatron" / run
    said = f"{run}: not in this directory; the one that comes with remit is used ({shipped})\n"
    assert done.stderr == said
    done = installed.remit("train", run, "--dry-run", "model=olmo2_1c")
    assert done.returncode == 2
    assert done.stderr.removeprefix(said).count("\n") == 1
    assert re.search(r"error: model: found 'olmo2_1c'; expected .*, olmo2_1b, only_here, .*youtu_2b; did", done.stderr)


def test_the_first_stages_of_the_quickstart(installed):
    """Text, token files, and the first steps of the base: what trains finds its configuration. Then it is stopped."""
    output, log = installed.work / "runs/quickstart", installed.root / "quickstart.log"
    metrics = output / "base/metrics.jsonl"
    with log.open("w") as stream:
        process = subprocess.Popen(
            installed.command("quickstart", "--steps", 1000),
            cwd=installed.work,
            env=clean_environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 240
            while not (metrics.exists() and metrics.read_text().endswith("\n")):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        finally:
            process.terminate()  # it takes its stages with it
            code = process.wait(timeout=120)
    assert code == 75, log.read_text()
    assert log.read_text().count("] Base: ") == 1 and "] Reference: " not in log.read_text()
    assert (output / "data/train.bin").stat().st_size > 10_000
    assert json.loads(metrics.read_text().splitlines()[0])["iteration"] == 1
