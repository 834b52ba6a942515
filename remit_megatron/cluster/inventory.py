"""The parameters of a model as one tensor-parallel rank holds them: their shapes, from the family's own layers.

The model is built once per tensor-parallel size, on ``meta`` and without pipeline stages. From there on everything is
arithmetic, so that a new family needs no formulas of its own here. Transformer Engine's layers can be built only where
it is installed and has a GPU; elsewhere their shapes are those of the local layers and of the family's table, which
says what they hold whole.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from typing import Any

from megatron.training.models.gpt import GPTModelBuilder

from remit_megatron.cluster.fake_world import MetaTensors, fake_world
from remit_megatron.models.build import model_config
from remit_megatron.models.family import family_of
from remit_megatron.models.mapping import WHOLE, TensorRank, place_of
from remit_megatron.models.spec import LOCAL, TE

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Inventory:
    """Shapes of one tensor-parallel rank's parameters by name, in order of registration.

    Attributes:
        embedding: tables in front of the first layer.
        layer: one transformer layer; all layers of a model are alike.
        final: norm after the last layer.
        head: output table. Tied to the embedding, the last pipeline stage holds a copy where it is not the first.
        tied: whether head and embedding are one.
        layers: number of transformer layers.
    """

    embedding: Shapes
    layer: Shapes
    final: Shapes
    head: Shapes
    tied: bool
    layers: int

    @property
    def matrix_elements(self) -> int:
        """Elements of the matrices of one layer: a token takes one multiplication and one addition for each."""
        return sum(math.prod(shape) for shape in self.layer.values() if len(shape) > 1)

    @property
    def head_elements(self) -> int:
        """Elements of the output table, padding rows included."""
        return sum(math.prod(shape) for shape in self.head.values())

    @property
    def all_parameters(self) -> int:
        """Parameters of this tensor-parallel rank without pipeline stages."""
        parts = [self.embedding, self.final, {} if self.tied else self.head]
        once = sum(math.prod(shape) for part in parts for shape in part.values())
        return once + self.layers * sum(math.prod(shape) for shape in self.layer.values())


def take_inventory(hf_config: dict[str, Any], args: argparse.Namespace, *, tensor_parallel: int) -> Inventory:
    """Builds the model as a rank of ``tensor_parallel`` ranks would, and reads the shapes off it.

    They are those of the layers that ``args.transformer_impl`` names, also where only local ones can be built. Names
    and order are those of the layers that were built.

    Args:
        hf_config: content of ``config.json``.
        args: a validated Megatron namespace; its parallel sizes are not used.
        tensor_parallel: size of the tensor-parallel group.

    Raises:
        UserError: the model cannot be cut into that many shards.
        RuntimeError: this process has a process group.
        ValueError: layers of different shapes, for which there is no arithmetic here.
    """
    own = argparse.Namespace(**vars(args))
    own.tensor_model_parallel_size = own.tensor_parallel_num_weight_shards = tensor_parallel
    own.pipeline_model_parallel_size = own.context_parallel_size = own.num_distributed_optimizer_instances = 1
    own.virtual_pipeline_model_parallel_size = own.pipeline_model_parallel_layout = None
    own.decoder_first_pipeline_num_layers = own.decoder_last_pipeline_num_layers = None
    own.account_for_embedding_in_pipeline_split = own.account_for_loss_in_pipeline_split = False
    own.sequence_parallel = own.sequence_parallel and tensor_parallel > 1
    own.overlap_p2p_comm = False
    config = model_config(hf_config, own)
    config.transformer.perform_initialization = False
    with fake_world(own, world_size=tensor_parallel, rank=0) as groups, MetaTensors():
        model = GPTModelBuilder(config).build_model(groups)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if args.transformer_impl == TE and config.transformer.transformer_impl == LOCAL:
        shapes = _under_transformer_engine(shapes, hf_config, tensor_parallel)
    return _sort(shapes)


def _under_transformer_engine(shapes: Shapes, hf_config: dict[str, Any], tensor_parallel: int) -> Shapes:
    """Shapes of the local layers with those parameters whole that Transformer Engine's keep so on every rank."""
    place = TensorRank(0, tensor_parallel)
    layer = family_of(hf_config).names(hf_config).layer
    whole = {weight.local: weight for weight in layer if place_of(weight, place, TE) == WHOLE}
    result = dict(shapes)
    for name, shape in shapes.items():
        match = _LAYER.fullmatch(name)
        if match and match[2] in whole:
            result[name] = whole[match[2]].full_shape(shape, tensor_parallel)
    return result


def _sort(shapes: Shapes) -> Inventory:
    layers: dict[int, Shapes] = {}
    embedding: Shapes = {}
    final: Shapes = {}
    head: Shapes = {}
    for name, shape in shapes.items():
        if match := _LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = shape
        elif name.startswith("embedding."):
            embedding[name] = shape
        elif name.startswith("output_layer."):
            head[name] = shape
        elif name.startswith("decoder."):
            final[name] = shape
        else:
            raise ValueError(f"parameter: found {name}; expected one of embedding, decoder and output_layer")
    first = layers[0]
    for number, layer in layers.items():
        # Order counts too: it is the order in the optimizer's buffers.
        if list(layer.items()) != list(first.items()):
            raise ValueError(f"layer {number}: found shapes other than those of layer 0; expected equal layers")
    tied = not head
    if tied:
        (table,) = embedding.values()
        head = {"output_layer.weight": table}
    return Inventory(embedding=embedding, layer=first, final=final, head=head, tied=tied, layers=len(layers))
