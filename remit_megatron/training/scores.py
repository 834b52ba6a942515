"""The source of a run's reference scores, put together from its configuration: a live reference, a cache, or both."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from remit_megatron.models.forward import ModelForward
from remit_megatron.objectives import weight_error_bound
from remit_megatron.reference.cached import CachedScores, RecordedScores
from remit_megatron.reference.gate import PrecisionGate, Verdict, verdict_line
from remit_megatron.reference.idle import IdleFiller
from remit_megatron.reference.live import LiveReference, Signal
from remit_megatron.reference.placement import placed_reference
from remit_megatron.reference.score_writer import ScoreWriter
from remit_megatron.reference.source import ScoreSource
from remit_megatron.runtime import parallel

if TYPE_CHECKING:
    from remit_megatron.run.prepare import Prepared
    from remit_megatron.run.score_cache import RunScores

logger = logging.getLogger(__name__)


@dataclass
class ScoreParts:
    """What gives a run its scores.

    Attributes:
        source: None where the objective needs no reference.
        writer: writes to the cache; to be flushed before a checkpoint, and closed at the end.
        gate: decides about a reference in FP8.
    """

    source: ScoreSource | None = None
    writer: ScoreWriter | None = None
    gate: PrecisionGate | None = None


def build_score_source(
    prepared: Prepared,
    scores: RunScores,
    *,
    forward: ModelForward,
    filler: IdleFiller,
    signal: Signal,
    say: Callable[[str], None],
    stopped: Callable[[], bool],
) -> ScoreParts:
    """Builds what a run's scores come from; collective over all ranks, after Megatron has its groups.

    Args:
        scores: what the run knows of its cache.
        forward: how a microbatch goes through a model.
        filler: runs what can be done while the student's pipeline waits.
        signal: what the objective wants.
        say: shows a line to whoever watches the run.
        stopped: whether this process was told to stop; not collective.
    """
    settings = prepared.config.reference
    if prepared.reference is None or settings is None:
        return ScoreParts()
    live = _live(prepared, forward=forward, filler=filler, signal=signal, say=say) if scores.live else None
    gate = live if isinstance(live, PrecisionGate) else None
    if scores.cache is None:
        return ScoreParts(live, gate=gate)
    writer = None if live is None else ScoreWriter(scores.cache, scores.names)
    if not scores.reads:
        assert live is not None
        return ScoreParts(RecordedScores(live, writer, forward=forward), writer, gate)
    source = CachedScores(
        scores.cache,
        names=scores.names,
        forward=forward,
        on_missing=settings.on_missing,
        live=live,
        writer=writer,
        replica=None if live is None else parallel.replica_group(forward.groups.dp.rank()),
        stopped=stopped,
    )
    return ScoreParts(source, writer, gate)


def _live(
    prepared: Prepared, *, forward: ModelForward, filler: IdleFiller, signal: Signal, say: Callable[[str], None]
) -> ScoreSource:
    """The frozen model on the student's ranks: in the run's precision, or behind the gate in FP8."""
    source, settings = prepared.reference, prepared.config.reference
    assert source is not None and settings is not None
    common: dict[str, Any] = dict(forward=forward, signal=signal, micro_batch_size=settings.micro_batch_size)
    if settings.fp8 is None:
        # What a cache lacks is scored in the step that needs it, not ahead.
        placement = settings.placement if settings.source == "live" else "pipeline"
        return placed_reference(source, prepared.arguments, placement=placement, filler=filler, **common)
    load = functools.partial(LiveReference.load, source, prepared.arguments, **common)

    def report(verdict: Verdict) -> None:
        text = verdict_line(verdict, f"{settings.fp8} ({settings.fp8_recipe})")
        logger.log(logging.INFO if verdict.accepted else logging.WARNING, "%s", text)
        say(text)

    objective = prepared.objective_settings
    return PrecisionGate(
        load(fp8=settings.fp8, fp8_recipe=settings.fp8_recipe),
        load(),
        forward=forward,
        # Objectives without weights of their own (rho1) compare losses as they are: neither centered nor clipped.
        error=functools.partial(
            weight_error_bound, epsilon=objective.get("epsilon"), centering=objective.get("centering", "none")
        ),
        batches=settings.fp8_gate_batches,
        tolerance=settings.fp8_tolerance,
        report=report,
    )
