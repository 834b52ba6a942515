"""What a model of Transformer Engine's layers holds, against the local layers' and the files: names, shapes, values,
and the marks by which Megatron reduces gradients and draws weight decay's line."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.families import CASES
from tests.te.models import LAYOUTS, LOCAL, TE, contents, names_of, ranks_of


@pytest.fixture(scope="module")
def held(pool, models):
    """What the ranks of a layout hold under a kind of layers, by case; each is built once."""

    @cache
    def of(layout: str, layers: str) -> dict[str, list[dict[str, Any]]]:
        directories = {case: str(path) for case, path in models.items()}
        ranks = pool.run(contents, world_size=ranks_of(layout), directories=directories, layout=layout, layers=layers)
        return {case: [rank[case] for rank in ranks] for case in models}

    return of


def parameters(rank: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: value for name, value in rank.items() if name != "modules"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_names_are_those_of_the_table_and_of_checkpoints(models, held, case, layout):
    names = names_of(models[case])
    expected = {weight.te for weight in (names.embedding, *names.final, names.head) if weight is not None}
    expected |= {f"{names.megatron_prefix}{layer}.{weight.te}" for layer in range(4) for weight in names.layer}
    for rank in held(layout, TE)[case]:
        assert parameters(rank).keys() == expected
        assert {"TERowParallelLinear", "TEDotProductAttention", "RMSNorm"} <= set(rank["modules"])
        assert not {"ScaledDotProductAttention", "RowParallelLinear"} & set(rank["modules"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_values_are_the_local_layers(models, held, case, layout):
    whole = {weight.local for weight in names_of(models[case]).layer if getattr(weight, "te_whole", False)}
    of_layers = {layers: held(layout, layers)[case] for layers in (TE, LOCAL)}
    shards: dict[Any, list[torch.Tensor]] = {}
    for rank in of_layers[LOCAL]:
        for entry in parameters(rank).values():
            shards.setdefault(entry["key"], []).append(entry["value"])
    for number, rank in enumerate(of_layers[TE]):
        keys = [entry["key"] for entry in parameters(rank).values()]
        assert len(keys) == len(set(keys)) and set(keys) == set(shards)
        for name, entry in parameters(rank).items():
            expected = shards[entry["key"]][number]
            if entry["key"][1] in whole:
                expected = torch.cat(shards[entry["key"]])
            assert entry["value"].dtype == expected.dtype
            assert torch.equal(entry["value"], expected), name


@pytest.mark.parametrize("layout", ["tp2", "tp2_sp"])
@pytest.mark.parametrize("case", CASES)
def test_marks_of_tensor_parallelism(models, held, case, layout):
    """A parameter that is cut says so, which the gradient's norm and clipping read; one that sees a part of the tokens
    says so under sequence parallelism, which sums its gradient over the ranks."""
    names = names_of(models[case])
    parallel = LAYOUTS[layout].get("sequence_parallel", False)
    for rank in held(layout, TE)[case]:
        for name, entry in parameters(rank).items():
            _, weight = names.find(name)
            split = getattr(weight, "split", "column") is not None and not getattr(weight, "te_whole", False)
            assert entry["tensor_model_parallel"] == split, name
            assert entry["sequence_parallel"] == (parallel and not split), name
            assert entry["allreduce"] is True, name
            if split:
                assert entry["partition_dim"] == (1 if getattr(weight, "split", "column") == "row" else 0), name


@pytest.mark.parametrize("layout", ["one", "tp2_sp"])
@pytest.mark.parametrize("case", CASES)
def test_weight_decay_draws_the_line_where_the_local_layers_have_it(held, case, layout):
    """Whatever a norm is called that is fused into the linear layer behind it."""
    for ours, theirs in zip(held(layout, LOCAL)[case], held(layout, TE)[case], strict=True):
        local = {entry["key"]: entry["decays"] for entry in parameters(ours).values()}
        fused = {entry["key"]: entry["decays"] for entry in parameters(theirs).values()}
        assert fused == local
        assert {decays[0] for decays in fused.values()} == {True, False} and all(d[1] for d in fused.values())
