"""``remit doctor``: versions, device, optional parts, patches, what would be used; why training cannot work."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from remit_megatron import __version__
from remit_megatron.doctor import probes
from remit_megatron.doctor.probes import Probe
from remit_megatron.runtime.installed import BrokenInstallation, foreign_patches_line, shipped_configs, use_own_patches
from remit_megatron.runtime.launch import openmp_settings

PYTHON = (3, 12)
MEGATRON = "0.19.2"
MINIMUM_MEMORY = 2_000_000_000  # bytes; torch and Megatron alone take about 1 GB per process
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # what says how threads compute and wait
_GB = 1e9
_ON_THE_CPU = " (CUDA_VISIBLE_DEVICES= in the environment trains on the CPU instead)"


@dataclass(frozen=True)
class Part:
    """An optional package: what was found, and what that means for training.

    Attributes:
        found: version, ``yes`` where it has none, or None where it is not installed.
        note: what it means.
        problem: why training could not work with it as it is; None where it could.
    """

    name: str
    found: str | None
    note: str
    problem: str | None = None


@dataclass(frozen=True)
class Host:
    """The machine as the operating system describes it; memory in bytes, load averaged over the last minute.

    ``openmp`` holds the settings of the environment.
    """

    python: tuple[int, int, int]
    cpu: str
    cores: int
    memory_total: int
    memory_available: int
    gpu_files: int
    driver: str | None
    gpus_hidden: bool
    load: float
    openmp: dict[str, str]


@dataclass(frozen=True)
class Report:
    """Everything the doctor found.

    Attributes:
        problems: why training cannot work; empty where it can.
        remarks: what should be known, and does not stop it.
        facts: host and torch as numbers, for programs (memory in bytes).
    """

    versions: dict[str, str | None]
    device: dict[str, str]
    parts: list[Part]
    patches: list[dict[str, Any]]
    used: dict[str, str]
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def host() -> Host:
    """This machine."""
    total, available = probes.host_memory()
    return Host(
        python=sys.version_info[:3],
        cpu=probes.cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_total=total,
        memory_available=available,
        gpu_files=probes.gpu_device_files(),
        driver=probes.driver_version(),
        gpus_hidden=os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"),
        load=os.getloadavg()[0],
        openmp={name: os.environ[name] for name in OPENMP if name in os.environ},
    )


def transformer_engine_part(*, timeout: float) -> Part:
    """Transformer Engine: absent is fine, whole is fine, without its torch part it stops Megatron."""
    name = "transformer-engine"
    if probes.module_folder("transformer_engine") is None:
        return Part(name, None, "not needed: Megatron's local layers, our attention and norms")
    found = probes.version("transformer-engine") or probes.version("transformer_engine") or "yes"
    # After torch, as Megatron does it: NCCL is loaded then, which a machine may have in torch's wheels only.
    error = probes.finish(probes.start("imports", "torch", "transformer_engine.pytorch"), timeout=timeout).error
    if error is None:
        return Part(name, found, "its torch part works")
    return Part(
        name, found, "its torch part does not import", f"transformer-engine: its torch part does not import ({error})"
    )


def apex_part() -> Part:
    """NVIDIA apex (fused optimizer and norms) or the unrelated PyPI package of the same name."""
    kind, found = probes.apex_kind(), probes.version("apex") or "yes"
    if kind is None:
        return Part("apex", None, "not needed")
    if kind == "nvidia":
        return Part(
            "apex", found, "NVIDIA's: Megatron uses its fused optimizer; layer norms of the local layers are ours"
        )
    return Part(
        "apex",
        found,
        "not NVIDIA's: an unrelated package",
        "apex: the installed package of that name is not NVIDIA's (PyPI's is a web toolkit), and Megatron takes any "
        "apex for it; remove it: uv pip uninstall apex",
    )


def resiliency_part(*, timeout: float) -> Part:
    """nvidia-resiliency-ext: Megatron imports it where it is found, so that it must import."""
    name = "nvidia-resiliency-ext"
    if probes.module_folder("nvidia_resiliency_ext") is None:
        return Part(name, None, "not needed: asynchronous saves by Megatron's own writer")
    found = probes.version(name) or "yes"
    error = probes.finish(
        probes.start("imports", "nvidia_resiliency_ext.checkpointing.async_ckpt.core"), timeout=timeout
    ).error
    return Part(name, found, "asynchronous saves may use it" if error is None else f"does not import ({error})")


def flash_attention_part() -> Part:
    """Flash attention 2 and 3, for Transformer Engine's attention; found without importing them."""
    for module, distribution in (("flash_attn_interface", "flash-attn-3"), ("flash_attn", "flash-attn")):
        if probes.module_folder(module) is not None:
            return Part(
                "flash attention", probes.version(distribution) or "yes", f"{module}: used through Transformer Engine"
            )
    return Part("flash attention", None, "not needed: torch and cuDNN bring their own")


def triton_part(*, gpu: bool) -> Part:
    """Triton needs a compiler and Python's headers, at run time."""
    found = probes.version("triton") or ("yes" if probes.module_folder("triton") else None)
    if found is None:
        return Part("triton", None, "our kernels run as plain torch")
    if not gpu:
        return Part("triton", found, "no GPU: our kernels run as plain torch")
    missing = probes.can_compile_kernels()
    return Part(
        "triton", found, "our kernels are compiled at first use" if missing is None else f"cannot compile: {missing}"
    )


def optional_parts(*, gpu: bool, timeout: float) -> list[Part]:
    """Everything that training can do without."""
    logs = [
        Part(name, probes.version(name), "can be logged to" if probes.version(name) else "not logged to")
        for name in ("wandb", "tensorboard")
    ]
    return [
        transformer_engine_part(timeout=timeout),
        apex_part(),
        flash_attention_part(),
        resiliency_part(timeout=timeout),
        triton_part(gpu=gpu),
        *logs,
    ]


def runs_on(capability: Sequence[int], architectures: Sequence[str]) -> bool:
    """Whether a torch built for ``architectures`` (``sm_80``, ``compute_90``, ...) runs on a GPU of this capability.

    Binary code runs on the same major version from its own minor version up; PTX code on everything newer.
    """
    major, minor = capability
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        digits = digits.rstrip("af")  # sm_90a: as sm_90 for this question
        built_major, built_minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and built_major == major and built_minor <= minor:
            return True
        if kind == "compute" and (built_major, built_minor) <= (major, minor):
            return True
    return False


def host_problems(machine: Host) -> list[str]:
    """What is wrong with Python and the memory."""
    problems = []
    if machine.python[:2] != PYTHON:
        found = ".".join(map(str, machine.python))
        problems.append(
            f"python: found {found}; expected {PYTHON[0]}.{PYTHON[1]} (./scripts/setup.sh makes .venv with it)"
        )
    if machine.memory_available < MINIMUM_MEMORY:
        problems.append(
            f"memory: found {machine.memory_available / _GB:.1f} GB free; expected {MINIMUM_MEMORY / _GB:.1f} or more"
        )
    return problems


def torch_problems(torch: Probe, machine: Host, *, require_gpu: bool) -> list[str]:
    """What is wrong with torch, its GPUs and its backends."""
    if torch.error is not None:
        return [f"torch: cannot be imported ({torch.error})"]
    facts, problems = torch.facts, []
    gpus = facts["gpus"]
    if machine.gpu_files and not gpus and not machine.gpus_hidden:
        if facts["cuda"] is None:
            problems.append(
                f"torch: found {facts['version']}, built for the CPU only, on a machine with a GPU; expected a CUDA "
                f"build{_ON_THE_CPU}"
            )
        else:
            reason = facts.get("no_gpu_because") or "torch.cuda.is_available() is false"
            problems.append(
                f"GPU: torch {facts['version']} (CUDA {facts['cuda']}) cannot use it: {reason}{_ON_THE_CPU}"
            )
    elif require_gpu and not gpus:
        problems.append("GPU: none found; expected at least one (--require-gpu)")
    wanted = "nccl" if gpus else "gloo"
    if wanted not in facts["backends"]:
        problems.append(f"torch: built without {wanted}, the backend for {'GPUs' if gpus else 'the CPU'}")
    for gpu in gpus:
        if facts.get("architectures") and not runs_on(gpu["capability"], facts["architectures"]):
            capability = ".".join(map(str, gpu["capability"]))
            problems.append(
                f"GPU: found {gpu['name']}, compute capability {capability}; torch was built for "
                + " ".join(facts["architectures"])
            )
            break
    return problems


def megatron_problems(megatron: Probe, found: str | None) -> list[str]:
    """What is wrong with Megatron: its version, or that it (or what it imports) does not import."""
    if found is None:
        return [f"megatron-core: not installed; expected {MEGATRON}"]
    if found.split("+")[0] != MEGATRON:
        return [f"megatron-core: found {found}; expected {MEGATRON}"]
    if megatron.error is not None:
        return [f"megatron: import with our patches fails ({megatron.error})"]
    return []


def own_parts() -> tuple[list[str], list[str]]:
    """(problems, remarks) about what is installed with this package."""
    problems, remarks = [], []
    try:
        foreign = use_own_patches()
        remarks += [foreign_patches_line(foreign)] if foreign else []
    except BrokenInstallation as error:
        problems.append(str(error))
    try:
        shipped_configs()
    except BrokenInstallation as error:
        problems.append(str(error))
    return problems, remarks


def describe_device(machine: Host, torch: Probe) -> dict[str, str]:
    """One row for the CPU, one for each GPU, and what connects them."""
    rows = {
        "CPU": f"{machine.cpu}, {machine.cores} core{'s' * (machine.cores != 1)}",
        "memory": f"{machine.memory_available / _GB:.1f} of {machine.memory_total / _GB:.1f} GB available",
    }
    for index, gpu in enumerate(torch.facts.get("gpus", [])):
        capability = ".".join(map(str, gpu["capability"]))
        rows[f"GPU {index}"] = f"{gpu['name']}, {gpu['memory'] / _GB:.1f} GB, compute capability {capability}"
    if not torch.facts.get("gpus"):
        rows["GPU"] = "hidden by CUDA_VISIBLE_DEVICES" if machine.gpu_files and machine.gpus_hidden else "none"
    else:
        rows["driver"] = f"{machine.driver or 'unknown'}, NCCL {torch.facts.get('nccl') or 'missing'}"
    return rows


def describe_openmp(machine: Host) -> str:
    """Threads on the CPU and how they wait: what the environment says, else what ``--nproc`` would choose now."""
    chosen = openmp_settings(machine.openmp, nproc=1, load=machine.load, cores=machine.cores)
    settings = machine.openmp | chosen
    threads = f"threads {settings['OMP_NUM_THREADS']}"
    if "OMP_NUM_THREADS" in chosen:
        threads += " for the ranks of --nproc together"
    sleeping = settings.get("OMP_WAIT_POLICY", "").lower() == "passive" or settings.get("GOMP_SPINCOUNT") == "0"
    waiting = [f"{name}={machine.openmp[name]}" for name in OPENMP[1:] if name in machine.openmp]
    if not waiting:
        waiting = [f"load {machine.load:.1f}"]
        waiting += ["--nproc sets OMP_WAIT_POLICY=passive"] if sleeping else ["OMP_WAIT_POLICY not set"]
    return f"{threads}; they {'sleep' if sleeping else 'spin'} while they wait ({', '.join(waiting)})"


def describe_use(machine: Host, torch: Probe, megatron: Probe) -> dict[str, str]:
    """What a run that starts now would use; the layer specification is asked of the code that trains."""
    gpus = torch.facts.get("gpus", [])
    layers = megatron.facts.get("transformer_impl")
    attention = {
        "transformer_engine": "Transformer Engine's",
        "local": "torch.nn.functional.scaled_dot_product_attention",
    }
    recipes = megatron.facts.get("fp8")
    return {
        "device": (f"cuda ({len(gpus)})" if gpus else "cpu") if torch.error is None else "unknown",
        "layers": layers or "unknown",
        "attention": attention.get(layers or "", "unknown"),
        "backend": ("nccl" if gpus else "gloo") if torch.error is None else "unknown",
        "FP8": "unknown" if recipes is None else describe_fp8(recipes),
        "OpenMP": describe_openmp(machine),
    }


def describe_fp8(recipes: dict[str, str | None]) -> str:
    """FP8 recipes that run here, and why the others do not; a reason that all share is said once."""
    usable = [recipe for recipe, reason in recipes.items() if reason is None]
    reasons: dict[str, list[str]] = {}
    for recipe, reason in recipes.items():
        if reason is not None:
            reasons.setdefault(reason, []).append(recipe)
    if not usable:
        return "no: " + "; ".join(reasons)
    return ", ".join(usable) + "".join(f"; not {', '.join(names)}: {reason}" for reason, names in reasons.items())


def examine(*, timeout: float = 300.0, allow_no_gpu: bool = False, require_gpu: bool = False) -> Report:
    """Looks at everything.

    Args:
        timeout: seconds that one library may take to import; generous, because of cold network file systems.
        allow_no_gpu: an image is examined where it is built, without its GPU: what fails there to import may need the
            driver, so that it becomes a remark.
        require_gpu: no GPU is a problem.
    """
    machine = host()
    # Both import torch, which takes most of the time: side by side.
    torch_child, megatron_child = probes.start("torch_facts"), probes.start("megatron_facts")
    torch = probes.finish(torch_child, timeout=timeout)
    megatron = probes.finish(megatron_child, timeout=timeout)
    parts = optional_parts(gpu=bool(torch.facts.get("gpus")), timeout=timeout)

    core = probes.version("megatron-core")
    from_imports = [part.problem for part in parts if part.name == "transformer-engine" and part.problem]
    broken, remarks = own_parts()
    from_imports += megatron_problems(megatron, core) if not broken else []  # it would say the same again
    problems = host_problems(machine) + broken + torch_problems(torch, machine, require_gpu=require_gpu)
    problems += [part.problem for part in parts if part.name != "transformer-engine" and part.problem]
    wrong_version = core is None or core.split("+")[0] != MEGATRON
    if allow_no_gpu and not torch.facts.get("gpus") and not wrong_version:
        remarks += [f"{problem}; examine it again on a machine with a GPU" for problem in from_imports]
    else:
        problems += from_imports
    cuda = torch.facts.get("cuda")
    return Report(
        versions={
            "remit": __version__,
            "python": ".".join(map(str, machine.python)),
            "torch": f"{torch.facts['version']}, {f'CUDA {cuda}' if cuda else 'CPU only'}" if torch.facts else None,
            "megatron-core": core,
            "transformers": probes.version("transformers"),
            "tokenizers": probes.version("tokenizers"),
        },
        device=describe_device(machine, torch),
        parts=parts,
        patches=megatron.facts.get("patches", []),
        used=describe_use(machine, torch, megatron),
        problems=problems,
        remarks=remarks,
        facts={"host": dataclasses.asdict(machine), "torch": torch.facts},
    )


def table(report: Report) -> str:
    """The report for people: aligned rows under short headings, the verdict last."""
    words = {True: "in force", False: "not needed here", None: "not known, applying them failed"}
    patches = {patch["name"]: f"{words[patch['in_force']]}: {patch['target']}" for patch in report.patches}
    sections: dict[str, dict[str, str]] = {
        "versions": {name: value or "not installed" for name, value in report.versions.items()},
        "device": report.device,
        "optional parts": {part.name: f"{part.found or 'not installed'} ({part.note})" for part in report.parts},
        "patches": patches or {"none": "could not be listed"},
        "would be used": report.used,
    }
    width = max(len(name) for rows in sections.values() for name in rows) + 2
    lines = []
    for title, rows in sections.items():
        lines += [title, *(f"  {name:<{width}}{value}" for name, value in rows.items())]
    lines += [f"remark: {remark}" for remark in report.remarks]
    lines += [f"problem: {problem}" for problem in report.problems]
    lines.append("training cannot work here" if report.problems else "training works here")
    return "\n".join(lines) + "\n"
