"""A run under its own layout and under others: validated arguments, as on a cluster of GPUs, and what is refused.

What a configuration cannot do on some number of GPUs is told from what it cannot do at all by trying: where the same
run is accepted under a small layout, its own layout is at fault.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from remit_megatron.cluster.planner import ReferencePlan
from remit_megatron.cluster.search import Layout, divisors
from remit_megatron.cluster.timing import Machine
from remit_megatron.models.build import check_layout, megatron_arguments
from remit_megatron.models.spec import LOCAL, TE
from remit_megatron.run.checks import check_document_mask, check_reference_settings, check_rounds
from remit_megatron.run.configuration import RunConfig
from remit_megatron.run.megatron_args import build_arguments, read_overrides
from remit_megatron.runtime.errors import UserError

_PLAIN = Layout(
    tensor=1, pipeline=1, virtual=1, context=1, data=1, micro_batch=1, sequence_parallel=False, recompute="none"
)


class RunLayouts:
    """Layouts of one run on one cluster.

    Args:
        config: the run.
        hf_config: content of the student's ``config.json``.
        machine: GPUs.
        nodes: hosts.
        signal: what the objective wants to know of the reference.
        reference: the frozen model; None without one.

    Raises:
        UserError: a model that no family knows, or a mistake below ``megatron`` that no layout mends.
    """

    def __init__(
        self,
        config: RunConfig,
        hf_config: dict[str, Any],
        *,
        machine: Machine,
        nodes: int,
        signal: str,
        reference: ReferencePlan | None,
    ):
        self.nodes, self.machine = nodes, machine
        self._config, self._signal = config, signal
        self._architecture = megatron_arguments(hf_config)
        self._reference = None if reference is None else megatron_arguments(reference.hf_config)
        self._written = read_overrides(config.megatron)
        # By the names of Megatron's namespace: a configuration may use those of its flags as well.
        self._names = {key: next(iter(read_overrides({key: value}))) for key, value in config.megatron.items()}

    @property
    def world_size(self) -> int:
        """GPUs of the cluster."""
        return self.nodes * self.machine.per_node

    def start(self) -> tuple[argparse.Namespace, UserError | None]:
        """What a plan starts from.

        Returns:
            Validated arguments and None; or, where the GPUs cannot take the configuration's own layout, arguments to
            search others from (their layout plays no part) and why.

        Raises:
            UserError: the configuration is wrong under every layout.
        """
        try:
            args = self.own()
            self._check_sizes(args)
        except UserError as refusal:
            return self._under_a_small_layout(refusal), refusal
        if self._signal != "none" and self._config.reference is not None:
            # Two settings of the file contradict each other on any number of GPUs; only its owner knows which is meant.
            check_reference_settings(self._config, args, signal=self._signal)
        return args, None

    def own(self, rank: int = 0) -> argparse.Namespace:
        """Validated arguments of a rank under the configuration's own layout."""
        return self._build({}, world_size=self.world_size, rank=rank)

    def of(self, layout: Layout, rank: int = 0, *, world_size: int | None = None, **others: Any) -> argparse.Namespace:
        """Validated arguments of a rank under another layout.

        Args:
            layout: sizes.
            rank: global rank.
            world_size: GPUs; None for those of the cluster.
            others: further keys of ``megatron`` to replace.

        Raises:
            UserError: Megatron refuses the layout.
        """
        return self._build(layout.overrides() | others, world_size=world_size or self.world_size, rank=rank)

    def allows(self, layout: Layout, args: argparse.Namespace) -> bool:
        """Whether the run takes a layout, as far as that is quickly told; ``args`` are those of the layout."""
        written = self._written
        total = written.get("eval_global_batch_size") or args.global_batch_size
        if total % ((written.get("eval_micro_batch_size") or layout.micro_batch) * layout.data):
            return False
        try:
            self._check_sizes(args)
            if self._signal != "none" and self._config.reference is not None:
                check_reference_settings(self._config, args, signal=self._signal)
        except UserError:
            return False
        return True

    def accepts(self, layout: Layout, **others: Any) -> bool:
        """Whether Megatron's own checks let a layout through; ``others`` as for :meth:`of`."""
        try:
            self.of(layout, **others)
        except UserError:
            return False
        return True

    def asked(self) -> argparse.Namespace:
        """The keys of a layout as the configuration has them, where they are not validated."""
        return argparse.Namespace(**{name: self._written.get(name, off) for name, off in _PLAIN.overrides().items()})

    def _build(self, overrides: Mapping[str, Any], *, world_size: int, rank: int = 0) -> argparse.Namespace:
        kept = {}
        for key, value in self._config.megatron.items():
            name = self._names[key]
            # Transformer Engine is what a GPU run takes where it is installed. It may not be here, and is then refused.
            assumed = name == "transformer_impl" and self._written[name] == TE
            if name not in overrides and not assumed:
                kept[key] = value
        config = dataclasses.replace(self._config, megatron=kept | dict(overrides))
        args = build_arguments(config, self._architecture, world_size=world_size, rank=rank, gpu=True)
        if self._written.get("transformer_impl") != LOCAL:
            args.transformer_impl = TE
        return args

    def _check_sizes(self, args: argparse.Namespace) -> None:
        """What the run refuses of some layouts and lets through of others, beside Megatron's checks."""
        check_document_mask(self._config, args)
        tensor = args.tensor_model_parallel_size
        if self.machine.per_node % tensor:
            expected = f"a divisor of {self.machine.per_node}: tensor parallelism stays within a node"
            raise UserError("megatron.tensor_model_parallel_size", tensor, expected)
        for values, whose in ((self._architecture, "model"), (self._reference, "reference")):
            if values is None:
                continue
            try:
                check_layout(values, args)
            except UserError as error:
                expected = f"{error.expected} of the {whose}"
                raise UserError(f"megatron.{error.field}", error.found, expected) from None
        check_rounds(args)

    def _under_a_small_layout(self, refusal: UserError) -> argparse.Namespace:
        """Arguments of the run on the few GPUs of a small layout, said to be of all; ``refusal``, or the mistake behind
        it, where there are none."""
        asked = vars(self.asked())
        if any(isinstance(value, int) and value < 1 for value in asked.values() if value is not False):
            raise refusal
        args = self._first_accepted(asked)
        if self._written.get("global_batch_size") is None:
            found = f"nothing, with a layout that does not fit ({refusal})"
            raise UserError("megatron.global_batch_size", found, "samples of a step, which other layouts share out")
        args.world_size = self.world_size
        return args

    def _first_accepted(self, asked: Mapping[str, Any]) -> argparse.Namespace:
        own = math.prod(asked[f"{axis}_parallel_size"] for axis in ("tensor_model", "pipeline_model", "context"))
        tries: list[tuple[Mapping[str, Any], int]] = [({"micro_batch_size": 1}, own)]
        tries += [
            (layout.overrides(), layout.tensor * layout.pipeline * layout.context) for layout in self._small_layouts()
        ]
        errors = []
        for overrides, world_size in tries:
            try:
                return self._build(overrides, world_size=world_size)
            except UserError as error:
                errors.append(error)
        # What every other layout has is the mistake; where they differ, what the own one has on GPUs to its measure.
        alike = len({str(error) for error in errors[1:]}) == 1
        raise errors[1 if alike else 0]

    def _small_layouts(self) -> Iterator[Layout]:
        """A plain one, and others for settings that demand several shards, stages or virtual stages."""
        layers = self._architecture["num_layers"]
        stages = [
            (pipeline, virtual) for pipeline in divisors(layers)[:2] for virtual in divisors(layers // pipeline)[:2]
        ]
        for pipeline, virtual in stages:
            for tensor in (1, 2):
                for context in (1, 2):
                    if virtual > 1 and pipeline == 1:
                        continue
                    sizes = {"tensor": tensor, "pipeline": pipeline, "virtual": virtual, "context": context}
                    yield dataclasses.replace(_PLAIN, **sizes, sequence_parallel=tensor > 1)
