"""The reference whole on every pipeline rank, scoring the coming step's microbatches in the student's pauses.

With p stages and m microbatches, where a forward pass takes F per stage and a backward pass 2F, a step then costs
max(4m, 3(m + p - 1)) F instead of 4(m + p - 1) F: the student's pipeline leaves 3(p - 1) F of every rank unused.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from remit_megatron.conversion.source import ModelSource
from remit_megatron.models.batch import Batch
from remit_megatron.models.forward import Item, ModelForward
from remit_megatron.reference.idle import IdleFiller
from remit_megatron.reference.live import LiveReference
from remit_megatron.reference.source import Schedule, merge_items
from remit_megatron.runtime.parallel import device

# Parts of the model per stage of the student's pipeline: small enough to fit into short pauses.
_PARTS_PER_STAGE = 4

Piece = Callable[..., Tensor]


@dataclass
class _Entry:
    """A microbatch on its way: kept until its scores are handed over."""

    item: Item
    owner: int
    score: Tensor | None = None


class ReplicatedReference(LiveReference):
    """A frozen model with all layers of its tensor-parallel shard on every pipeline rank.

    Each pipeline rank scores whole microbatches, number n of a step on rank n mod p; the losses go to the last stage.
    What has been given to :meth:`ahead` is scored in the pauses of the present step, the rest when it is asked for.
    Between steps it holds token ids and one float per token.

    Args:
        chunk: the whole model, frozen, in evaluation mode.
        pieces: the model in parts (:func:`cut`) that are called one after the other as GPTModel is, from the second one
            on with the hidden states before them as ``decoder_input``.
        filler: runs the parts in the pauses.
        vocab_size, forward, micro_batch_size: as in `LiveReference`. Microbatches of one rank go through the model
            together, as many as ``micro_batch_size`` allows.
    """

    def __init__(
        self,
        chunk: torch.nn.Module,
        *,
        vocab_size: int,
        forward: ModelForward,
        pieces: Sequence[Piece],
        filler: IdleFiller,
        micro_batch_size: int | None = None,
    ):
        super().__init__([chunk], vocab_size=vocab_size, forward=forward, micro_batch_size=micro_batch_size)
        self.filler = filler
        self.pieces = list(pieces)
        self._entries: dict[int, _Entry] = {}

    @classmethod
    def load(
        cls, source: ModelSource, arguments: Any, *, forward: ModelForward, **settings: Any
    ) -> ReplicatedReference:
        """See :meth:`LiveReference.load`; ``settings`` are those of this class, FP8 is not among them."""
        from remit_megatron.conversion.loading import load_weights
        from remit_megatron.models.build import build_chunks, model_config
        from remit_megatron.models.fp8 import frozen_arguments

        groups = copy.copy(forward.groups)
        groups.pp = alone()
        own = without_pipeline(frozen_arguments(arguments))
        (chunk,) = build_chunks(model_config(source.hf_config, own), groups)
        load_weights([chunk], source)
        stages = forward.groups.pp.size() * (arguments.virtual_pipeline_model_parallel_size or 1)
        pieces = cut(chunk, stages=stages)
        return cls(chunk, pieces=pieces, vocab_size=source.hf_config["vocab_size"], forward=forward, **settings)

    # -- scores ------------------------------------------------------------------------------------------------------

    def score(self, schedule: Schedule, buffers: list[list[Item]], **settings: Any) -> list[Tensor]:
        """See :meth:`ScoreSource.score`."""
        items = buffers[-1]
        late = [(number, item) for number, item in enumerate(items) if id(item) not in self._entries]
        for _ in self._quanta(self._enter(late)):
            pass
        return self._hand_over([self._entries.pop(id(item)) for item in items])

    @contextmanager
    def ahead(self, items: Sequence[Item], *, microbatches: int, model: Any) -> Generator[None]:
        """See :meth:`LookAhead.ahead`."""
        new = [(number, item) for number, item in enumerate(items) if id(item) not in self._entries]
        with self.filler.step(self._quanta(self._enter(new)), kind=microbatches), self._before_gradients_meet(model):
            yield

    @contextmanager
    def _before_gradients_meet(self, model: Any) -> Generator[None]:
        """Runs what is left when this rank's part of the schedule is over.

        A rank is done before those of earlier stages; where Megatron then sums gradients over ranks it would wait.
        """
        config = model[0].config if isinstance(model, list) else model.config
        finalize = config.finalize_model_grads_func

        def finish_and_finalize(*args: Any, **kwargs: Any) -> Any:
            self.filler.finish()
            return finalize(*args, **kwargs)

        if finalize is not None:
            config.finalize_model_grads_func = finish_and_finalize
        try:
            yield
        finally:
            config.finalize_model_grads_func = finalize

    def _enter(self, numbered: Sequence[tuple[int, Item]]) -> list[_Entry]:
        """Notes who scores what; returns what this rank does."""
        pp = self.forward.groups.pp
        own = []
        for number, item in numbered:
            entry = self._entries[id(item)] = _Entry(item, number % pp.size())
            if entry.owner == pp.rank():
                own.append(entry)
        return own

    def _quanta(self, entries: Sequence[_Entry]) -> Iterator[None]:
        """Scores microbatches piece by piece; every ``next`` runs one piece."""
        if not entries:
            return
        together = 1
        if self.micro_batch_size is not None:
            together = max(1, self.micro_batch_size // entries[0].item["tokens"].size(0))
        for first in range(0, len(entries), together):
            group = entries[first : first + together]
            batch = self.forward.batch(merge_items([entry.item for entry in group]))
            inputs, named = self.forward.inputs(batch)
            hidden: Tensor | None = None
            for number, piece in enumerate(self.pieces, start=1):
                hidden = self._run(piece, batch, inputs, named, hidden)
                if number == len(self.pieces):
                    for entry, score in zip(group, hidden.chunk(len(group)), strict=True):
                        entry.score = score
                yield

    def _run(self, piece: Piece, batch: Batch, inputs: Any, named: dict[str, Any], hidden: Tensor | None) -> Tensor:
        # Not around the loop above: between two pieces the student runs, with gradients.
        with torch.no_grad():
            return piece(
                *inputs, **named, decoder_input=hidden, output_processor=self.losses, output_processor_context=batch
            )

    def _hand_over(self, entries: Sequence[_Entry]) -> list[Tensor]:
        """The scores of a step, [b, s] each, on the last pipeline stage; elsewhere nothing. Collective over stages."""
        groups = self.forward.groups
        pp, last = groups.pp, groups.pp.size() - 1
        if not entries:
            return []
        numbers: list[list[int]] = [[] for _ in range(pp.size())]
        for number, entry in enumerate(entries):
            numbers[entry.owner].append(number)
        rows, length = entries[0].item["tokens"].shape
        shape = (max(map(len, numbers)), rows, length // groups.cp.size())
        own = torch.zeros(shape, dtype=torch.float32, device=device())
        for place, number in enumerate(numbers[pp.rank()]):
            score = entries[number].score
            assert score is not None, "scored by its owner"
            own[place] = score
        parts = [torch.empty_like(own) for _ in numbers] if pp.rank() == last else None
        dist.gather(own, parts, dst=dist.get_global_rank(pp, last), group=pp)
        if parts is None:
            return []
        placed = {
            number: part[place]
            for part, owned in zip(parts, numbers, strict=True)
            for place, number in enumerate(owned)
        }
        return [placed[number] for number in range(len(entries))]


def without_pipeline(arguments: Any) -> argparse.Namespace:
    """Megatron's arguments for a model that is not cut into pipeline stages; the rest as it is."""
    own = argparse.Namespace(**vars(arguments))
    own.pipeline_model_parallel_size = 1
    own.account_for_embedding_in_pipeline_split = own.account_for_loss_in_pipeline_split = False
    own.overlap_p2p_comm = False
    for name in (
        "virtual_pipeline_model_parallel_size",
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
        "pipeline_model_parallel_layout",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "microbatch_group_size_per_vp_stage",
    ):
        setattr(own, name, None)
    return own


def alone() -> dist.ProcessGroup:
    """A group of this process only; no other rank has to take part."""
    group = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def cut(chunk: torch.nn.Module, *, stages: int) -> list[Piece]:
    """A whole model as parts of a few layers each, and one for the last norm and the head.

    The parts are GPTModels that share the model's modules: what happens between two layers is Megatron's own.

    Args:
        chunk: a model without pipeline stages (wrapped or not).
        stages: of the student's pipeline, virtual ones included; a part is a quarter of what one of them would hold, or
            one layer.
    """
    from remit_megatron.models.build import unwrap

    model = unwrap(chunk)
    layers = list(model.decoder.layers)
    length = max(1, len(layers) // (stages * _PARTS_PER_STAGE))

    def part(own: Sequence[torch.nn.Module], *, last: bool) -> torch.nn.Module:
        norm = model.decoder.final_layernorm if last else None
        decoder = _view(model.decoder, layers=torch.nn.ModuleList(own), final_layernorm=norm)
        return _view(model, decoder=decoder, post_process=last)

    parts = [part(layers[first : first + length], last=False) for first in range(0, len(layers), length)]
    return [*parts, part([], last=True)]


def _view(module: torch.nn.Module, **changes: Any) -> torch.nn.Module:
    """The same module with other attributes: parameters and submodules are shared, not copied."""
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    for name, value in changes.items():
        setattr(view, name, value)
    return view
