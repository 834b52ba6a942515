"""``remit plan``: memory, time and layout of a run on a cluster, without the cluster.

The configuration is the one of ``remit train``. Neither data nor weights are read: the architecture comes from
``model``, or from ``init`` where it is here; a reference whose files are elsewhere is taken to be like the student.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remit_megatron.run.configuration import RunConfig, load_config, load_model_description
from remit_megatron.runtime.errors import EXIT_DO_NOT_RESTART, EXIT_DONE, UserError
from remit_megatron.runtime.files import write_atomic

if TYPE_CHECKING:
    from remit_megatron.cluster.planner import Placement, Planner, ReferencePlan
    from remit_megatron.cluster.search import Search
    from remit_megatron.cluster.simulate import SimulatedRank
    from remit_megatron.cluster.timing import Machine


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


def _check_options(args: argparse.Namespace) -> None:
    for option, value in (("--nodes", args.nodes), ("--gpus-per-node", args.gpus_per_node)):
        if value < 1:
            raise UserError(option, value, "1 or more")
    if not 0 < args.mfu <= 1:
        raise UserError("--mfu", args.mfu, "a share above 0 and at most 1")
    if not 0 <= args.headroom < 1:
        raise UserError("--headroom", args.headroom, "a share from 0 to below 1")


def plan(config: RunConfig, *, machine: Machine, nodes: int, headroom: float = 0.08, simulate: bool = False) -> Any:
    """Plans a run; ``patches.apply()`` comes first.

    Args:
        config: the run.
        machine: GPUs, and how much of their peak is reached.
        nodes: hosts.
        headroom: share of a GPU's memory that is left alone.
        simulate: build first, middle and last rank on ``meta``.

    Returns:
        A :class:`remit_megatron.cluster.report.Report`.

    Raises:
        UserError: the configuration is wrong, or cannot be laid out on these GPUs.
    """
    from remit_megatron.cluster.planner import Planner
    from remit_megatron.cluster.report import Report
    from remit_megatron.cluster.search import candidate, own_layout
    from remit_megatron.models.family import family_of
    from remit_megatron.objectives import build_objective
    from remit_megatron.run.checks import check_dropout, check_linear_loss, check_supported
    from remit_megatron.run.derived import plan_numbers
    from remit_megatron.run.prepare import objective_settings

    objective = build_objective(config.objective.name, **objective_settings(config))
    hf_config, signal = _architecture(config), objective.reference_signal
    arguments = _arguments_of(config, hf_config, nodes * machine.per_node)
    args = arguments(config, 0)
    check_supported(config, args)
    _check_for_layout(config, args, signal)
    if objective.needs_global_batch:
        check_dropout(config, args)
    if config.loss.linear:
        check_linear_loss(config, args, objective)
    _check_node(args, machine)
    planner = Planner(
        hf_config,
        args,
        machine=machine,
        reference=_reference(config, hf_config, signal),
        student_passes=int(objective.needs_global_batch),
        document_mask=config.data.document_mask,
        linear_loss=config.loss.linear,
    )
    stages = sorted({0, args.pipeline_model_parallel_size // 2, args.pipeline_model_parallel_size - 1})
    return Report(
        numbers=plan_numbers(args, unlisted=family_of(hf_config).unlisted_parameters(hf_config)),
        args=args,
        planner=planner,
        own=candidate(planner, own_layout(args), args),
        stages=[planner.memory(args, stage) for stage in stages],
        time=planner.time(args),
        found=_search(config, planner, arguments, signal=signal, limit=machine.gpu.memory * (1 - headroom)),
        headroom=headroom,
        simulated=_simulate(planner, hf_config, lambda rank: arguments(config, rank)) if simulate else [],
    )


def _architecture(config: RunConfig) -> dict[str, Any]:
    if config.model is not None:
        return load_model_description(config.model)
    from remit_megatron.conversion.source import resolve

    assert config.init is not None, "load_config asks for one of the two"
    return resolve(config.init, field="init").hf_config


def _arguments_of(
    config: RunConfig, hf_config: dict[str, Any], world_size: int
) -> Callable[[RunConfig, int], argparse.Namespace]:
    """How a configuration and a rank become validated arguments, as on a cluster of GPUs."""
    from remit_megatron.models.build import megatron_arguments
    from remit_megatron.models.spec import LOCAL, TE
    from remit_megatron.run.megatron_args import build_arguments, read_overrides

    architecture = megatron_arguments(hf_config)
    local = read_overrides(config.megatron).get("transformer_impl") == LOCAL

    def arguments(config: RunConfig, rank: int) -> argparse.Namespace:
        # Transformer Engine is what a GPU run takes where it is installed. It may not be here, and is then refused.
        asked = {"transformer_impl": TE}
        written = {name: value for name, value in config.megatron.items() if read_overrides({name: value}) != asked}
        config = dataclasses.replace(config, megatron=written)
        args = build_arguments(config, architecture, world_size=world_size, rank=rank, gpu=True)
        if not local:
            args.transformer_impl = TE
        return args

    return arguments


def _check_for_layout(config: RunConfig, args: argparse.Namespace, signal: str) -> None:
    """What the run refuses of some layouts and lets through of others."""
    from remit_megatron.run.checks import check_document_mask, check_reference_settings

    check_document_mask(config, args)
    if signal != "none" and config.reference is not None:
        check_reference_settings(config, args, signal=signal)


def _check_node(args: argparse.Namespace, machine: Machine) -> None:
    if machine.per_node % args.tensor_model_parallel_size:
        expected = f"a divisor of {machine.per_node}: tensor parallelism stays within a node"
        raise UserError("megatron.tensor_model_parallel_size", args.tensor_model_parallel_size, expected)


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


def _search(
    config: RunConfig,
    planner: Planner,
    arguments: Callable[[RunConfig, int], argparse.Namespace],
    *,
    signal: str,
    limit: float,
) -> Search:
    """All layouts; the first ones are those that Megatron's own checks let through."""
    from remit_megatron.cluster.search import Layout, search
    from remit_megatron.run.megatron_args import read_overrides

    written = read_overrides(config.megatron)
    # Other ways to say what a layout says.
    for name in ("num_layers_per_virtual_pipeline_stage", "pipeline_model_parallel_layout"):
        written.pop(name, None)
    for end in ("first", "last"):
        written.pop(f"decoder_{end}_pipeline_num_layers", None)
    for part in ("embedding", "loss"):
        written.pop(f"account_for_{part}_in_pipeline_split", None)

    def allowed(layout: Layout) -> bool:
        try:
            _check_for_layout(config, layout.arguments(planner.args), signal)
        except UserError:
            return False
        return True

    def accepted(layout: Layout) -> bool:
        try:
            arguments(dataclasses.replace(config, megatron=written | layout.overrides()), 0)
        except UserError:
            return False
        return True

    return search(planner, limit=limit, allowed=allowed, accepted=accepted)


def _simulate(
    planner: Planner, hf_config: dict[str, Any], arguments: Callable[[int], argparse.Namespace]
) -> list[SimulatedRank]:
    from remit_megatron.cluster.inventory import take_inventory
    from remit_megatron.cluster.simulate import interesting_ranks, simulate_rank
    from remit_megatron.models.spec import transformer_impl

    # The plan is compared for the layers that can be built here; those of the run may hold more.
    args = argparse.Namespace(**vars(planner.args))
    args.transformer_impl = transformer_impl(args.transformer_impl)
    sharded = take_inventory(hf_config, args, tensor_parallel=args.tensor_model_parallel_size)
    whole = take_inventory(hf_config, args, tensor_parallel=1)
    return [
        simulate_rank(hf_config, arguments, rank, sharded=sharded, whole=whole)
        for rank in interesting_ranks(planner.args.world_size)
    ]
