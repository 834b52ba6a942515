"""``remit plan``: memory, time and layout of a run on a cluster, without the cluster. ``remit status``: how it does.

The configuration of a plan is the one of ``remit train``. Neither data nor weights are read: the architecture comes
from ``model``, or from ``init`` where it is here; a reference with files elsewhere is taken to be like the student.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remit_megatron.run.configuration import RunConfig, blend_prefixes, load_config, load_model_description
from remit_megatron.runtime.errors import EXIT_DO_NOT_RESTART, EXIT_DONE, UserError
from remit_megatron.runtime.files import write_atomic

if TYPE_CHECKING:
    from remit_megatron.cluster.planner import Placement, ReferencePlan
    from remit_megatron.cluster.report import Report
    from remit_megatron.cluster.simulate import SimulatedRank
    from remit_megatron.cluster.timing import Machine
    from remit_megatron.objectives import Objective


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit status``."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directory, also of a run that goes on elsewhere")
    parser.add_argument("--json", action="store_true", help="a JSON object; a list of them for several runs")


def run_status(args: argparse.Namespace) -> int:
    """Runs ``remit status``; returns the exit code."""
    from remit_megatron.cluster.run_status import run_status as read
    from remit_megatron.cluster.run_status import status_text

    found = [read(run_dir) for run_dir in args.runs]
    if args.json:
        texts = [status.to_json() for status in found]
        sys.stdout.write(texts[0] if len(texts) == 1 else f"[{','.join(texts)}]\n")
    else:
        sys.stdout.write("\n".join(map(status_text, found)))
    return EXIT_DONE


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit plan``."""
    parser.add_argument("config", metavar="CONFIG", help="run configuration (YAML)")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="values that replace the file's")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="hosts of the job")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="GPUs of a host (default: 8)")
    parser.add_argument("--gpu", default="H100", metavar="NAME", help="kind of GPU (default: H100)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="its memory, where it is not the usual one")
    parser.add_argument(
        "--headroom",
        type=float,
        default=0.08,
        metavar="SHARE",
        help="share of the memory left for CUDA, NCCL and fragmentation (default: 0.08)",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.40,
        metavar="SHARE",
        help="share of the bf16 peak that is reached outside bubbles and communication (default: 0.40)",
    )
    parser.add_argument(
        "--simulate", action="store_true", help="build first, middle and last rank on meta and compare their bytes"
    )
    parser.add_argument("--json", metavar="F", help="write the figures to a file as well")


def run_plan(args: argparse.Namespace) -> int:
    """Runs ``remit plan``; returns the exit code: 70 where the simulation finds other bytes than the plan."""
    _check_options(args)
    config = load_config(args.config, args.overrides)
    import patches

    patches.apply()
    from remit_megatron.cluster.hardware import gpu_named
    from remit_megatron.cluster.report import as_json, text
    from remit_megatron.cluster.timing import Machine

    gpu = gpu_named(args.gpu, memory_gib=args.gpu_memory)
    machine = Machine(gpu=gpu, per_node=args.gpus_per_node, utilization=args.mfu)
    report = plan(config, machine=machine, nodes=args.nodes, headroom=args.headroom, simulate=args.simulate)
    sys.stdout.write(text(report))
    if args.json:
        write_atomic(Path(args.json), json.dumps(as_json(report), indent=1, default=str) + "\n")
    return EXIT_DONE if all(rank.agrees for rank in report.simulated) else EXIT_DO_NOT_RESTART


def _check_data(config: RunConfig) -> None:
    """Refuses settings that go by the ends of documents, for those data sets that are here and do not mark them."""
    from remit_megatron.data.blend_file import is_blend_file
    from remit_megatron.data.manifest import manifest_path
    from remit_megatron.data.tokenizer import load_tokenizer
    from remit_megatron.run.samples import check_document_ends

    prefixes = blend_prefixes(config.data.train, config.data.valid)
    there = [prefix for prefix in prefixes if not is_blend_file(prefix) and Path(manifest_path(prefix)).exists()]
    if there and config.data.tokenizer and Path(config.data.tokenizer).exists():
        check_document_ends(config, there, load_tokenizer(config.data.tokenizer))


def _check_options(args: argparse.Namespace) -> None:
    for option, value in (("--nodes", args.nodes), ("--gpus-per-node", args.gpus_per_node)):
        if value < 1:
            raise UserError(option, value, "1 or more")
    if not 0 < args.mfu <= 1:
        raise UserError("--mfu", args.mfu, "a share above 0 and at most 1")
    if not 0 <= args.headroom < 1:
        raise UserError("--headroom", args.headroom, "a share from 0 to below 1")


def plan(config: RunConfig, *, machine: Machine, nodes: int, headroom: float = 0.08, simulate: bool = False) -> Report:
    """Plans a run; ``patches.apply()`` comes first.

    Args:
        config: the run.
        machine: GPUs, and how much of their peak is reached.
        nodes: hosts.
        headroom: share of a GPU's memory that is left alone.
        simulate: build first, middle and last rank on ``meta``.

    Returns:
        Figures of the configuration's own layout, or of the best one where these GPUs cannot take that; and the best
        others.

    Raises:
        UserError: the configuration is wrong, or no layout of these GPUs is possible.
    """
    from remit_megatron.cluster.planner import Planner
    from remit_megatron.cluster.report import Report
    from remit_megatron.cluster.run_layouts import RunLayouts
    from remit_megatron.cluster.search import candidate, own_layout, search
    from remit_megatron.cluster.what_would import no_layout
    from remit_megatron.models.family import family_of
    from remit_megatron.objectives import build_objective
    from remit_megatron.run.derived import plan_numbers
    from remit_megatron.run.prepare import objective_settings

    objective = build_objective(config.objective.name, **objective_settings(config))
    hf_config, signal = _architecture(config), objective.reference_signal
    reference = _reference(config, hf_config, signal)
    runs = RunLayouts(config, hf_config, machine=machine, nodes=nodes, signal=signal, reference=reference)
    args, refusal = runs.start()
    _check_settings(config, hf_config, args, objective)
    _check_data(config)
    planner = Planner(
        hf_config,
        args,
        machine=machine,
        reference=reference,
        student_passes=int(objective.needs_global_batch),
        document_mask=config.data.document_mask,
        linear_loss=config.loss.linear,
    )
    found = search(
        planner,
        limit=machine.gpu.memory * (1 - headroom),
        allowed=lambda layout: runs.allows(layout, layout.arguments(planner.args)),
        accepted=runs.accepts,
    )
    shown, arguments = own_layout(args), runs.own
    if refusal is not None:
        if not found.fitting:
            raise no_layout(planner, runs, refusal, found)
        shown = found.fitting[0].layout
        arguments = partial(runs.of, shown)
        args = arguments()
    stages = sorted({0, args.pipeline_model_parallel_size // 2, args.pipeline_model_parallel_size - 1})
    return Report(
        numbers=plan_numbers(args, unlisted=family_of(hf_config).unlisted_parameters(hf_config)),
        args=args,
        planner=planner,
        shown=candidate(planner, shown, args),
        refusal=refusal,
        asked=args if refusal is None else runs.asked(),
        stages=[planner.memory(args, stage) for stage in stages],
        time=planner.time(args),
        found=found,
        headroom=headroom,
        simulated=_simulate(hf_config, args, arguments) if simulate else [],
    )


def _check_settings(
    config: RunConfig, hf_config: dict[str, Any], args: argparse.Namespace, objective: Objective
) -> None:
    """What the run refuses under every layout."""
    from remit_megatron.run.checks import check_dropout, check_layers, check_linear_loss, check_supported

    check_supported(config, args)
    check_layers(hf_config, args)
    if objective.needs_global_batch:
        check_dropout(config, args)
    if config.loss.linear:
        check_linear_loss(config, args, objective)


def _architecture(config: RunConfig) -> dict[str, Any]:
    if config.model is not None:
        return load_model_description(config.model)
    from remit_megatron.conversion.source import resolve

    assert config.init is not None, "load_config asks for one of the two"
    return resolve(config.init, field="init").hf_config


def _reference(config: RunConfig, student: dict[str, Any], signal: str) -> ReferencePlan | None:
    from remit_megatron.cluster.planner import ReferencePlan
    from remit_megatron.conversion.source import resolve

    settings = config.reference
    if signal == "none":
        return None
    if settings is None or settings.checkpoint is None:
        raise UserError("reference.checkpoint", "nothing", f"a model; objective {config.objective.name} needs one")
    placement: Placement = "pipeline"
    if signal == "loss":  # whole distributions are neither kept in a cache nor handed from a copy
        replicated = settings.placement == "replicated"
        placement = "cached" if settings.source == "cache" else "replicated" if replicated else "pipeline"
    here = Path(settings.checkpoint).is_dir()
    hf_config = resolve(settings.checkpoint, field="reference.checkpoint").hf_config if here else student
    return ReferencePlan(hf_config, placement, signal, assumed=not here)


def _simulate(
    hf_config: dict[str, Any], run: argparse.Namespace, arguments: Callable[[int], argparse.Namespace]
) -> list[SimulatedRank]:
    from remit_megatron.cluster.inventory import take_inventory
    from remit_megatron.cluster.simulate import interesting_ranks, simulate_rank
    from remit_megatron.models.spec import transformer_impl

    # The plan is compared for the layers that can be built here; those of the run may hold more.
    args = argparse.Namespace(**vars(run))
    args.transformer_impl = transformer_impl(args.transformer_impl)
    sharded = take_inventory(hf_config, args, tensor_parallel=args.tensor_model_parallel_size)
    whole = take_inventory(hf_config, args, tensor_parallel=1)
    return [
        simulate_rank(hf_config, arguments, rank, sharded=sharded, whole=whole)
        for rank in interesting_ranks(run.world_size)
    ]
