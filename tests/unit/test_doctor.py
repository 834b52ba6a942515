"""``remit doctor`` against packages that are broken in the ways that were seen: real module folders on ``sys.path``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from remit_megatron.doctor import probes as doctor_probes
from remit_megatron.doctor import report as doctor
from remit_megatron.doctor.probes import Probe
from remit_megatron.doctor.report import Host

REPOSITORY = Path(__file__).resolve().parents[2]
GB = 10**9


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, first on ``sys.path``."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def add_module(folder: Path, name: str, source: str = "") -> None:
    """Makes ``name`` (dotted) a package with this source; its parents become packages where they are none."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        package = folder.joinpath(*parts[:depth])
        package.mkdir(exist_ok=True)
        if not (package / "__init__.py").exists():
            (package / "__init__.py").write_text("")
    folder.joinpath(*parts, "__init__.py").write_text(source)


def add_distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def healthy_host(**changes) -> Host:
    values = {
        "python": (3, 12, 1),
        "cpu": "a processor",
        "cores": 2,
        "memory_total": 24 * GB,
        "memory_available": 20 * GB,
        "gpu_files": 0,
        "driver": None,
        "gpus_hidden": False,
        "load": 0.25,
        "openmp": {},
    }
    return Host(**(values | changes))


def probe(function: str, *arguments: str, timeout: float = 60) -> Probe:
    return doctor_probes.finish(doctor_probes.start(function, *arguments), timeout=timeout)


# Children.


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", None),
        ("print('remit-probe is not this'); import sys; print('noise', file=sys.stderr)", None),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('first line\\nsecond line')", "RuntimeError: first line"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import os; os._exit(9)", "ended with exit code 9"),
        ("import os, sys; print('out of luck', file=sys.stderr); os._exit(9)", "out of luck"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed: Segmentation fault (signal 11)"),
    ],
)
def test_an_import_is_reported_and_not_suffered(packages: Path, source: str, expected: str | None) -> None:
    add_module(packages, "fragile", source)
    assert probe("imports", "fragile").error == expected
    assert "fragile" not in sys.modules


def test_an_import_that_hangs_is_ended_with_its_children(packages: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    add_module(
        packages,
        "slow",
        f"import pathlib, subprocess, time\nchild = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\ntime.sleep(60)",
    )
    assert probe("imports", "slow", timeout=3).error == "no answer within 3 s"
    status = Path("/proc", pid_file.read_text(), "status")
    deadline = time.monotonic() + 5
    while (alive := status.exists() and "\nState:\tZ" not in status.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


# Packages.


def test_apex_of_pypi_is_told_from_nvidias(packages: Path) -> None:
    assert doctor.apex_part() == doctor.Part("apex", None, "not needed")
    add_module(packages, "apex.lib")
    add_module(packages, "apex.ext")
    add_distribution(packages, "apex", "0.9.10.dev0")
    part = doctor.apex_part()
    assert part.found == "0.9.10.dev0"
    assert part.problem is not None and "not NVIDIA's" in part.problem and "uv pip uninstall apex" in part.problem

    add_module(packages, "apex.multi_tensor_apply")
    add_module(packages, "apex.normalization")
    part = doctor.apex_part()
    assert part.problem is None and part.note.startswith("NVIDIA's")


def test_transformer_engine_needs_its_torch_part(packages: Path) -> None:
    assert doctor.transformer_engine_part(timeout=60).found is None
    add_module(packages, "transformer_engine")
    add_distribution(packages, "transformer-engine", "2.9.0")
    part = doctor.transformer_engine_part(timeout=60)
    assert part.found == "2.9.0"
    assert part.problem is not None and "No module named 'transformer_engine.pytorch'" in part.problem

    # Its libraries are found where torch has loaded those they need.
    add_module(
        packages, "transformer_engine.pytorch", "import sys\nif 'torch' not in sys.modules: raise OSError('libnccl')"
    )
    assert doctor.transformer_engine_part(timeout=60).problem is None
    assert "transformer_engine" not in sys.modules


def test_flash_attention_is_found_in_both_forms(packages: Path) -> None:
    assert doctor.flash_attention_part().found is None
    add_module(packages, "flash_attn")
    add_distribution(packages, "flash-attn", "2.8.3")
    assert doctor.flash_attention_part().found == "2.8.3"
    (packages / "flash_attn_interface.py").write_text("")
    assert "flash_attn_interface" in doctor.flash_attention_part().note


def test_resiliency_extension_that_does_not_import_is_named(packages: Path) -> None:
    assert doctor.resiliency_part(timeout=60).found is None
    add_module(packages, "nvidia_resiliency_ext", "raise ImportError('GLIBC_2.38 not found')")
    assert "GLIBC_2.38 not found" in doctor.resiliency_part(timeout=60).note


# torch, as a package of the parts that the doctor asks.


def add_torch(
    folder: Path,
    *,
    version: str = "2.13.0",
    cuda: str | None = None,
    backends: tuple[str, ...] = ("gloo",),
    gpus: tuple[tuple[str, int, int], ...] = (),
    architectures: tuple[str, ...] = ("sm_90",),
    warning: str | None = None,
) -> None:
    add_module(folder, "torch.cuda.nccl", "def version(): return (2, 29, 7)")
    add_module(folder, "torch.version", f"cuda = {cuda!r}")
    add_module(
        folder,
        "torch.distributed",
        f"def is_available(): return True\ndef is_gloo_available(): return {'gloo' in backends}\n"
        f"def is_nccl_available(): return {'nccl' in backends}",
    )
    add_module(
        folder,
        "torch.cuda",
        f"""
import types, warnings
def is_available():
    if {warning!r}: warnings.warn({warning!r})
    return {bool(gpus)}
def device_count(): return {len(gpus)}
def get_arch_list(): return {list(architectures)!r}
def get_device_properties(index):
    name, major, minor = {gpus!r}[index]
    return types.SimpleNamespace(name=name, major=major, minor=minor, total_memory=80 * 10**9)
""",
    )
    add_module(folder, "torch", f"from torch import cuda, distributed, version\n__version__ = {version!r}")


def test_facts_of_the_torch_that_is_installed() -> None:
    facts = probe("torch_facts", timeout=300).facts
    assert facts["version"].startswith("2.13.")
    assert "gloo" in facts["backends"]


def test_a_torch_that_does_not_import_is_the_reason(packages: Path) -> None:
    add_module(packages, "torch", "raise OSError('libcudart.so.13: cannot open shared object file')")
    [problem] = doctor.torch_problems(probe("torch_facts"), healthy_host(), require_gpu=False)
    assert problem == "torch: cannot be imported (OSError: libcudart.so.13: cannot open shared object file)"


def test_gpu_with_a_torch_for_the_cpu(packages: Path) -> None:
    add_torch(packages, version="2.13.0+cpu")
    found = probe("torch_facts")
    [problem] = doctor.torch_problems(found, healthy_host(gpu_files=1), require_gpu=False)
    assert "found 2.13.0+cpu, built for the CPU only, on a machine with a GPU" in problem
    assert doctor.torch_problems(found, healthy_host(), require_gpu=False) == []
    assert doctor.torch_problems(found, healthy_host(gpu_files=1, gpus_hidden=True), require_gpu=False) == []
    assert doctor.torch_problems(found, healthy_host(), require_gpu=True) == [
        "GPU: none found; expected at least one (--require-gpu)"
    ]


def test_gpu_with_a_driver_that_is_too_old(packages: Path) -> None:
    add_torch(packages, cuda="13.0", backends=("gloo", "nccl"), warning="the driver is too old (found version 11040)")
    [problem] = doctor.torch_problems(probe("torch_facts"), healthy_host(gpu_files=8), require_gpu=False)
    assert "the driver is too old (found version 11040)" in problem


def test_missing_backend(packages: Path) -> None:
    add_torch(packages, cuda="13.0", gpus=(("H100", 9, 0),))
    [problem] = doctor.torch_problems(probe("torch_facts"), healthy_host(gpu_files=1), require_gpu=True)
    assert problem == "torch: built without nccl, the backend for GPUs"


def test_gpus_are_described_and_their_capability_is_checked(packages: Path) -> None:
    add_torch(packages, cuda="13.0", backends=("gloo", "nccl"), gpus=(("H100", 9, 0), ("V100", 7, 0)))
    found = probe("torch_facts")
    machine = healthy_host(gpu_files=2, driver="580.65.06")
    rows = doctor.describe_device(machine, found)
    assert rows["GPU 0"] == "H100, 80.0 GB, compute capability 9.0"
    assert rows["driver"] == "580.65.06, NCCL 2.29.7"
    [problem] = doctor.torch_problems(found, machine, require_gpu=False)
    assert "found V100, compute capability 7.0; torch was built for sm_90" in problem
    assert doctor.describe_use(healthy_host(), found, Probe({"transformer_impl": "transformer_engine"})) == {
        "device": "cuda (2)",
        "layers": "transformer_engine",
        "attention": "Transformer Engine's",
        "backend": "nccl",
        "FP8": "unknown",
        "OpenMP": "threads 2 for the ranks of --nproc together; they spin while they wait "
        "(load 0.2, OMP_WAIT_POLICY not set)",
    }


def test_how_threads_wait_is_told() -> None:
    crowded = doctor.describe_openmp(healthy_host(load=1.5))
    assert crowded.endswith("they sleep while they wait (load 1.5, --nproc sets OMP_WAIT_POLICY=passive)")
    chosen = healthy_host(load=1.5, openmp={"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "ACTIVE"})
    assert doctor.describe_openmp(chosen) == "threads 1; they spin while they wait (OMP_WAIT_POLICY=ACTIVE)"
    counted = doctor.describe_openmp(healthy_host(openmp={"GOMP_SPINCOUNT": "0"}))
    assert counted.endswith("they sleep while they wait (GOMP_SPINCOUNT=0)")


def test_fp8_recipes_are_told_with_the_reason_of_the_others() -> None:
    gpu = "Device compute capability 10.0 or higher required"
    recipes = {"delayed": None, "tensorwise": None, "mxfp8": gpu, "blockwise": "CUDA >= 12.9"}
    found = doctor.describe_use(healthy_host(), Probe({}), Probe({"fp8": recipes}))["FP8"]
    assert found == f"delayed, tensorwise; not mxfp8: {gpu}; not blockwise: CUDA >= 12.9"
    assert doctor.describe_fp8({"delayed": "too old", "mxfp8": "too old"}) == "no: too old"


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["sm_90", "sm_100"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 1), ["sm_120"], True),
        ((7, 0), ["sm_75", "compute_75"], False),
    ],
)
def test_which_gpus_a_build_runs_on(capability: tuple[int, int], architectures: list[str], runs: bool) -> None:
    assert doctor.runs_on(capability, architectures) is runs


# The host.


def test_host_problems() -> None:
    assert doctor.host_problems(healthy_host()) == []
    [problem] = doctor.host_problems(healthy_host(python=(3, 11, 7)))
    assert problem.startswith("python: found 3.11.7; expected 3.12")
    [problem] = doctor.host_problems(healthy_host(memory_available=GB))
    assert problem == "memory: found 1.0 GB free; expected 2.0 or more"


def test_memory_without_limits(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       24000000 kB\nMemFree: 1 kB\nMemAvailable:   20000000 kB\n")
    assert doctor_probes.host_memory(tmp_path, tmp_path / "none") == (24000000 * 1024, 20000000 * 1024)


@pytest.mark.parametrize(
    ("membership", "folder", "limit_file", "used"),
    [
        ("0::/slurm/job_7/step_0", "slurm/job_7", "memory.max", "anon"),
        ("3:cpuset:/\n4:memory:/slurm/job_7", "memory/slurm/job_7", "memory.limit_in_bytes", "total_rss"),
    ],
)
def test_memory_under_the_limit_of_a_job(
    tmp_path: Path, membership: str, folder: str, limit_file: str, used: str
) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text(membership + "\n")
    (tmp_path / "meminfo").write_text("MemTotal:       24000000 kB\nMemAvailable:   20000000 kB\n")
    limited = tmp_path / "cgroup" / folder
    limited.mkdir(parents=True)
    (limited / limit_file).write_text(f"{8 * GB}\n")
    (limited / "memory.stat").write_text(f"file 12\n{used} {3 * GB}\n")
    assert doctor_probes.host_memory(tmp_path, tmp_path / "cgroup") == (8 * GB, 5 * GB)


def test_gpus_of_the_kernel(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia0x"):
        (tmp_path / name).touch()
    assert doctor_probes.gpu_device_files(tmp_path) == 2
    version = tmp_path / "driver" / "nvidia" / "version"
    version.parent.mkdir(parents=True)
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)\n"
    )
    assert doctor_probes.driver_version(tmp_path) == "580.65.06"
    assert doctor_probes.driver_version(tmp_path / "none") is None


# Megatron.


def test_megatron_versions() -> None:
    assert doctor.megatron_problems(Probe({}), None) == ["megatron-core: not installed; expected 0.19.2"]
    assert doctor.megatron_problems(Probe({}), "0.18.0") == ["megatron-core: found 0.18.0; expected 0.19.2"]
    assert doctor.megatron_problems(Probe({}), "0.19.2+abc1234") == []
    assert doctor.megatron_problems(Probe({}, "ImportError: x"), "0.19.2") == [
        "megatron: import with our patches fails (ImportError: x)"
    ]


def test_expected_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert f"megatron-core[training]=={doctor.MEGATRON}" in project["dependencies"]
    assert project["requires-python"] == f">=3.{doctor.PYTHON[1]},<3.{doctor.PYTHON[1] + 1}"


# The command.


def run_doctor(*options: str, packages: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = [str(packages)] if packages else []
    return subprocess.run(
        [sys.executable, "-m", "remit_megatron", "doctor", *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(REPOSITORY)]), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_a_healthy_machine() -> None:
    done = run_doctor("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert report["used"].pop("OpenMP").startswith("threads ")
    assert report["used"] == {
        "device": "cpu",
        "layers": "local",
        "attention": "torch.nn.functional.scaled_dot_product_attention",
        "backend": "gloo",
        "FP8": "no: it needs Transformer Engine and a GPU",
    }
    assert {"cpu_device", "compile_helpers"} <= {patch["name"] for patch in report["patches"] if patch["in_force"]}
    assert done.stderr == ""


def test_broken_packages_end_with_70_and_the_reasons(packages: Path) -> None:
    """The two that pip offers most readily; Megatron itself is the real one and fails as it does for users."""
    add_module(packages, "transformer_engine")
    add_distribution(packages, "transformer-engine", "2.9.0")
    add_module(packages, "apex.lib")
    done = run_doctor(packages=packages)
    assert done.returncode == 70
    problems = re.findall(r"^problem: (\S+):", done.stdout, re.MULTILINE)
    assert problems == ["apex", "transformer-engine", "megatron"]
    assert done.stdout.endswith("training cannot work here\n")
    assert "not known, applying them failed: " in done.stdout and "not needed here: " not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_in_an_image_without_its_gpu_an_import_is_a_remark(packages: Path) -> None:
    add_module(packages, "transformer_engine.pytorch", "raise OSError('libcuda.so.1: cannot open shared object file')")
    done = run_doctor("--allow-no-gpu", packages=packages)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "remark: transformer-engine: its torch part does not import (OSError: libcuda.so.1" in done.stdout
