"""What ``remit doctor`` looks at: the host, the packages, and what happens when they are imported.

Imports happen in child processes with a time limit: a library that crashes, hangs or prints is then a finding, not the
end of the doctor. Nothing here imports torch or megatron into this process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.runtime.installed import use_own_patches

_MARK = "remit-probe:"

# Runs in the child. sys.path is the parent's, so that both see the same packages.
_CHILD = """
import json, sys, warnings
sys.path[:] = json.loads(sys.argv[2])
warnings.simplefilter("ignore")
from remit_megatron.doctor import probes as doctor_probes
facts = getattr(doctor_probes, sys.argv[1])(*sys.argv[3:])
print("\\n" + doctor_probes._MARK + json.dumps(facts), flush=True)
"""


@dataclass(frozen=True)
class Probe:
    """A child process's answer.

    Attributes:
        facts: what the probe function returned; empty where it failed.
        error: one line that says why it failed; None where it did not.
    """

    facts: dict[str, Any]
    error: str | None = None


def start(function: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts a function of this module in a child process; :func:`finish` takes its answer."""
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, function, json.dumps(sys.path), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # so that a time limit also ends what the child started
    )


def finish(child: subprocess.Popen[str], *, timeout: float) -> Probe:
    """Waits at most ``timeout`` seconds for a child of :func:`start`."""
    try:
        output, errors = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return Probe({}, f"no answer within {timeout:.0f} s")
    answers = [line for line in output.splitlines() if line.startswith(_MARK)]
    if child.returncode == 0 and answers:
        facts = json.loads(answers[-1].removeprefix(_MARK))
        return Probe(facts, facts.pop("error", None))
    if child.returncode < 0:
        return Probe({}, f"crashed: {signal.strsignal(-child.returncode)} (signal {-child.returncode})")
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return Probe({}, _shorten(lines[-1]) if lines else f"ended with exit code {child.returncode}")


def describe(error: BaseException) -> str:
    """One line: the type of an exception and the first line of what it says."""
    text = str(error).strip().splitlines()
    return _shorten(f"{type(error).__name__}: {text[0]}" if text else type(error).__name__)


def _shorten(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


# Probe functions: they run in a child.


def imports(*modules: str) -> dict[str, Any]:
    """Whether ``modules`` can be imported, one after the other."""
    try:
        for module in modules:
            importlib.import_module(module)
    except BaseException as error:  # libraries call sys.exit while they are imported, too
        return {"error": describe(error)}
    return {}


def torch_facts() -> dict[str, Any]:
    """torch's version and build, what it can communicate with, and the GPUs that it can use."""
    import warnings

    try:
        import torch
        from torch.cuda import nccl
    except BaseException as error:
        return {"error": describe(error)}
    distributed = torch.distributed if torch.distributed.is_available() else None
    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "backends": [
            name for name in ("gloo", "nccl") if distributed and getattr(distributed, f"is_{name}_available")()
        ],
        "gpus": [],
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        facts["no_gpu_because"] = _shorten(str(caught[-1].message).splitlines()[0]) if caught else None
        return facts
    facts["architectures"] = torch.cuda.get_arch_list()
    facts["nccl"] = ".".join(map(str, nccl.version())) if "nccl" in facts["backends"] else None
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = [properties.major, properties.minor]
        facts["gpus"].append({"name": properties.name, "memory": properties.total_memory, "capability": capability})
    return facts


def megatron_facts() -> dict[str, Any]:
    """Applies the patches and imports Megatron as training does; what was patched, what would be used, and which FP8
    recipes run here (recipe to None, or to why it does not)."""
    facts: dict[str, Any] = {"patches": []}
    try:
        use_own_patches()
        import patches

        registered, applied = patches.registered(), False
        try:
            patches.apply()
            applied = True
        finally:
            facts["patches"] = [
                # Behind one that fails it is not known whether the others are needed here.
                {
                    "name": patch.name,
                    "target": patch.target,
                    "in_force": patch.in_force() or (False if applied else None),
                    "why": patch.why,
                }
                for patch in registered
            ]
        import megatron.core
        import megatron.training.training  # noqa: F401

        from remit_megatron.models import fp8
        from remit_megatron.models.spec import transformer_impl

        facts["transformer_impl"] = transformer_impl()
        facts["fp8"] = fp8.support()
    except BaseException as error:
        facts["error"] = describe(error)
    return facts


# The host.


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the processor, or its architecture where the kernel does not tell."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.machine()


def host_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(total, available) bytes of memory for this process: the machine's, or less under a limit of job or container."""
    fields = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE))
    total, available = int(fields["MemTotal"]) * 1024, int(fields["MemAvailable"]) * 1024
    for limit, used in _memory_limits(proc / "self" / "cgroup", cgroup):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return total, available


def _memory_limits(membership: Path, cgroup: Path) -> list[tuple[int, int]]:
    """(limit, anonymous memory in use) of the memory cgroups that this process is in, version 1 and 2, leaf first."""
    limits = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit_file, field = cgroup, "memory.max", "anon"
        elif "memory" in controllers.split(","):
            root, limit_file, field = cgroup / "memory", "memory.limit_in_bytes", "total_rss"
        else:
            continue
        folder = root / path.lstrip("/")
        while True:
            try:
                limit = (folder / limit_file).read_text().strip()
                used = re.search(rf"^{field} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
                if limit != "max":
                    limits.append((int(limit), int(used.group(1)) if used else 0))
            except OSError:
                pass  # the root has no limit, and a container sees only its own part of the tree
            if folder in (root, root.parent):
                break
            folder = folder.parent
    return limits


def gpu_device_files(dev: Path = Path("/dev")) -> int:
    """How many NVIDIA GPUs the kernel offers here, whether or not torch can use them."""
    return sum(1 for path in dev.glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit())


def driver_version(proc: Path = Path("/proc")) -> str | None:
    """Version of the NVIDIA driver that is loaded."""
    try:
        match = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", (proc / "driver/nvidia/version").read_text())
    except OSError:
        return None
    return match.group(1) if match else None


def can_compile_kernels() -> str | None:
    """None where Triton can build its launchers, else what it misses: a C compiler or Python's headers."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")):
        return "no C compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"no Python headers (Python.h in {sysconfig.get_path('include')})"
    return None


# Packages, without importing them.


def version(distribution: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def module_folder(module: str) -> Path | None:
    """Folder (or folder of the file) of a top-level module on ``sys.path``; None where there is none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin).parent if spec.origin else None


def apex_kind() -> str | None:
    """``nvidia`` or ``unrelated`` (PyPI's web toolkit, or anything else of that name); None where there is no apex."""
    folder = module_folder("apex")
    if folder is None:
        return None
    # What Megatron imports of it.
    return (
        "nvidia" if all((folder / part).is_dir() for part in ("multi_tensor_apply", "normalization")) else "unrelated"
    )
