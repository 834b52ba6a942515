"""Scripts for set-up, image and Slurm, run with small programs on the PATH in place of uv, srun and scontrol."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text()


def program(folder: Path, name: str, source: str) -> Path:
    """A shell script on the PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{source}\n")
    path.chmod(0o755)
    return path


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


# setup.sh.

UV = """
echo "$@" >> "$FAKE_LOG"
case "$1 $2" in
  "--version "*) echo "uv 0" ;;
  "venv --quiet")
    mkdir -p "${@: -1}/bin"
    ln -sf "${@: -2:1}" "${@: -1}/bin/python" ;;
  "pip install")
    [[ -z "${FAKE_FAILURE:-}" ]] && exit 0
    printf '%s\\n' "error: Failed to fetch" "  cause: $FAKE_FAILURE" "" "hint: no" >&2
    exit 2 ;;
  *) exit 1 ;;
esac
"""


class Checkout:
    """A copy of what set-up reads, a uv that installs nothing, and a Python 3.12 where pyenv keeps them."""

    def __init__(self, folder: Path):
        self.root = folder / "a repository"
        self.bin = folder / "bin"
        self.log = folder / "uv.log"
        (self.root / "scripts").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "scripts/setup.sh"):
            shutil.copy(REPOSITORY / name, self.root / name)
        program(self.bin, "uv", UV)
        program(self.bin, "python3.12", 'echo "pyenv: python3.12: command not found" >&2; exit 127')
        self.python = folder / "pyenv" / "versions" / "3.12.99" / "bin" / "python3"
        self.python.parent.mkdir(parents=True)
        self.python.symlink_to(sys.executable)
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(folder),
            "PYENV_ROOT": str(folder / "pyenv"),
            "FAKE_LOG": str(self.log),
        }

    def setup(self, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return run(self.root / "scripts" / "setup.sh", cwd=cwd or self.root, **(self.environment | environment))

    def installs(self) -> int:
        return self.log.read_text().count("pip install") if self.log.exists() else 0


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_setup_skips_a_python_on_the_path_that_does_not_run(checkout: Checkout) -> None:
    done = checkout.setup()
    assert done.returncode == 0, done.stderr
    python = checkout.root / ".venv" / "bin" / "python"
    assert python.readlink().is_absolute() and python.readlink() != checkout.bin / "python3.12"
    version = run(python, "-c", "import sys; print(sys.version_info[:2])", cwd=checkout.root)
    assert version.stdout == "(3, 12)\n"
    arguments = checkout.log.read_text()
    assert f"--constraints {checkout.root}/constraints.txt --editable {checkout.root}[test]" in arguments
    assert len(done.stderr.splitlines()) <= 3


def test_setup_does_nothing_the_second_time_from_any_directory(checkout: Checkout, tmp_path: Path) -> None:
    assert checkout.setup(cwd=tmp_path).returncode == 0
    assert checkout.installs() == 1
    again = checkout.setup(cwd=Path("/"))
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert checkout.installs() == 1


def test_setup_looks_behind_an_active_virtual_environment(checkout: Checkout) -> None:
    """uv passes over interpreters of virtual environments, and would download one."""
    active = Path(sys.executable).parent
    done = checkout.setup(PATH=f"{checkout.bin}:{active}:/usr/bin:/bin", REMIT_PYTHON=str(active / "python"))
    assert done.returncode == 0, done.stderr
    assert (checkout.root / ".venv" / "bin" / "python").readlink() == Path(sys.executable).resolve()


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml"])
def test_setup_installs_again_after_a_change(checkout: Checkout, name: str) -> None:
    checkout.setup()
    with open(checkout.root / name, "a") as file:
        file.write("# changed\n")
    assert checkout.setup().returncode == 0
    assert checkout.installs() == 2


def test_setup_that_failed_is_not_taken_for_done(checkout: Checkout) -> None:
    failed = checkout.setup(FAKE_FAILURE="no route to host")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == (
        "setup: installing failed: cause: no route to host (whole text: .venv-tools/setup.log)"
    )
    assert checkout.setup().returncode == 0
    assert checkout.installs() == 2


def test_setup_refuses_another_python_by_name(checkout: Checkout) -> None:
    other = program(checkout.bin, "other", "exit 1")
    done = checkout.setup(REMIT_PYTHON=str(other))
    assert (done.returncode, done.stderr) == (
        1,
        f"setup: REMIT_PYTHON: found {other}; expected a complete Python 3.12\n",
    )


# constraints.txt and the image.


def pinned() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {re.split(r"[\[=<>!~ ]", requirement)[0] for requirement in wanted}
    assert names <= pinned().keys()
    assert pinned()["megatron-core"] == "0.19.2"
    assert pinned()["torch"].startswith("2.13.")


def test_what_must_never_be_a_dependency_is_none() -> None:
    assert not pinned().keys() & {"apex", "nvidia-resiliency-ext", "transformer-engine", "transformer-engine-torch"}


def test_constraints_hold_pins_and_comments_only() -> None:
    wrong = [line for line in CONSTRAINTS.splitlines() if not re.fullmatch(r"#.*|[a-z0-9.-]+==[0-9a-z.+!]+", line)]
    assert wrong == []


def image_requirements(python_path: Path) -> tuple[set[str], str]:
    done = subprocess.run(
        # -S: without the site-packages of this environment, which has torch.
        [sys.executable, "-S", REPOSITORY / "scripts" / "image_requirements.py", REPOSITORY / "constraints.txt"],
        env={"PYTHONPATH": str(python_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split()), done.stderr


def test_an_image_keeps_its_torch(tmp_path: Path) -> None:
    everything = {f"{name}=={version}" for name, version in pinned().items()}
    installed, remark = image_requirements(tmp_path)
    assert installed == everything
    assert remark.startswith("torch comes from constraints.txt")

    info = tmp_path / "torch-2.13.0a0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0a0\n")
    installed, remark = image_requirements(tmp_path)
    left_out = {pin.split("==")[0] for pin in everything - installed}
    assert installed < everything and {"torch", "triton", "nvidia-nccl-cu13"} <= left_out
    assert all(name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-")) for name in left_out)
    assert remark.startswith("torch comes from the image")


def test_entry_point_gives_a_home_where_there_is_none(tmp_path: Path) -> None:
    program(tmp_path, "remit", 'touch "$HOME/cache" && echo "remit $*"')
    done = run(
        REPOSITORY / "scripts" / "entrypoint.sh", "doctor", cwd=tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin", HOME="/none"
    )
    assert (done.returncode, done.stdout) == (0, "remit doctor\n")


# train.sbatch and score.sbatch.

SLURM_SCRIPTS = REPOSITORY / "scripts" / "slurm"


class Job:
    """A batch script as Slurm would run it: a copy elsewhere, its own programs recorded."""

    def __init__(self, folder: Path, command: str = "train"):
        self.submitted_from = folder / "repository"
        self.bin = folder / "bin"
        self.script = folder / "spool" / "slurm_script"
        self.script.parent.mkdir()
        shutil.copy(SLURM_SCRIPTS / f"{command}.sbatch", self.script)
        shared = self.submitted_from / "scripts" / "slurm" / "ranks.sh"
        shared.parent.mkdir(parents=True)
        shutil.copy(SLURM_SCRIPTS / "ranks.sh", shared)
        (self.submitted_from / "run.yaml").write_text("")
        (self.submitted_from / "remit_megatron.sqsh").write_text("")
        program(self.bin, "srun", 'printf "%s\\n" "srun $*" "rendezvous $MASTER_ADDR $MASTER_PORT"; exit "$FAKE_CODE"')
        program(self.bin, "scontrol", 'if [[ $1 == show ]]; then printf "%s\\n" n7 n8; else echo "scontrol $*"; fi')

    def run(self, *arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        slurm = {
            "SLURM_JOB_ID": "20017",
            "SLURM_JOB_NODELIST": "n[7-8]",
            "SLURM_SUBMIT_DIR": str(self.submitted_from),
            "SLURM_NTASKS": "16",
            "SLURM_CPUS_PER_TASK": "4",
        }
        path = f"{self.bin}:/usr/bin:/bin"
        return run(
            "bash",
            self.script,
            *arguments,
            cwd=self.bin,
            **({"PATH": path, "FAKE_CODE": str(code)} | slurm | environment),
        )


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_sbatch_starts_one_task_per_gpu_in_the_container(job: Job) -> None:
    done = job.run("run.yaml", "seed=7", REMIT_MOUNTS="/data:/data")
    assert done.returncode == 0, done.stderr
    here = str(job.submitted_from)
    command, rendezvous = done.stdout.splitlines()
    assert command.endswith(" remit train run.yaml seed=7")
    assert f"--container-image={here}/remit_megatron.sqsh " in command
    assert f"--container-mounts={here}:{here},/data:/data " in command
    assert "--cpus-per-task=4 " in command
    assert "--gpus-per-task" not in command
    assert rendezvous == "rendezvous n7 10017"


@pytest.mark.parametrize("code", [0, 75])
def test_sbatch_of_a_scoring_job(tmp_path: Path, code: int) -> None:
    """The same as for training but for the command; a job of an array has an id of its own."""
    done = Job(tmp_path, "score").run("run.yaml", "--all", "seed=7", code=code, SLURM_JOB_NAME="remit-score")
    assert done.returncode == code
    command, rendezvous, *requeued = done.stdout.splitlines()
    assert command.endswith(" remit score run.yaml --all seed=7") and "--container-image=" in command
    assert rendezvous == "rendezvous n7 10017"
    assert requeued == (["scontrol requeue 20017"] if code else [])
    assert all(line.startswith("remit-score: ") for line in done.stderr.splitlines())


def test_sbatch_from_elsewhere(job: Job) -> None:
    (job.submitted_from / "scripts" / "slurm" / "ranks.sh").unlink()
    done = job.run("run.yaml")
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1
    assert "scripts/slurm/ranks.sh: no such file; expected to be submitted from the repository" in done.stderr


def test_sbatch_without_a_container(job: Job) -> None:
    missing = job.run("run.yaml", REMIT_CONTAINER="")
    assert missing.returncode == 2 and ".venv/bin/remit: not there" in missing.stderr
    remit = job.submitted_from / ".venv" / "bin" / "remit"
    remit.parent.mkdir(parents=True)
    program(remit.parent, "remit", "")
    done = job.run("run.yaml", REMIT_CONTAINER="")
    assert done.returncode == 0, done.stderr
    assert f"{remit} train run.yaml" in done.stdout and "--container" not in done.stdout


@pytest.mark.parametrize(("code", "again"), [(0, False), (75, True), (70, False), (2, False), (1, False), (137, False)])
def test_sbatch_starts_again_after_75_only(job: Job, code: int, again: bool) -> None:
    done = job.run("run.yaml", code=code)
    assert done.returncode == code
    assert ("scontrol requeue 20017" in done.stdout) is again


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {}, "found no configuration"),
        (("none.yaml",), {}, "none.yaml: no such file in "),
        (("run.yaml",), {"SLURM_JOB_ID": ""}, "expected to be submitted"),
        (("run.yaml",), {"REMIT_CONTAINER": "other.sqsh"}, "REMIT_CONTAINER: found other.sqsh, which is no file"),
    ],
)
def test_sbatch_says_what_is_missing(
    job: Job, arguments: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    done = job.run(*arguments, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["train", "score"])
def test_sbatch_is_never_asked_for_a_name_that_serialises_other_runs(command: str) -> None:
    """All runs share the default job name: a singleton dependency would queue them behind each other."""
    header = (SLURM_SCRIPTS / f"{command}.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", header, re.MULTILINE))
    assert "dependency" not in options
    assert options["output"] == "%x-%j.out" and options["open-mode"] == "append"
    assert options["signal"] == {"train": "TERM@300", "score": "TERM@120"}[command], (
        "without B: the signal goes to the ranks"
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
