"""Replicas of a model read its files once between them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_conversion import run_import
from tests.tiny import make_llama, make_tokenizer

RANKS = 4
# Bytes that all ranks together read, in models: by source and tensor-parallel size. docs/benchmarks/reading.md has what
# was measured; each replica for itself would read 4, 4, 2 and 4.
LIMITS = {("huggingface", 1): 1.1, ("checkpoint", 1): 1.4, ("huggingface", 2): 1.45, ("checkpoint", 2): 2.65}


def bytes_read() -> int:
    """Of this process, by any call; what the page cache gave counts too."""
    line = Path("/proc/self/io").read_text().splitlines()[0]
    assert line.startswith("rchar")
    return int(line.split()[1])


def load(model: str, tp: int) -> dict[str, Any]:
    import patches

    patches.apply()
    from remit_megatron.conversion.loading import load_weights
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.conversion.source import resolve
    from remit_megatron.models.build import build_chunks, default_arguments, model_config

    source = resolve(model)
    with process_groups(tensor_model_parallel_size=tp) as groups:
        arguments = default_arguments(tensor_model_parallel_size=tp)
        chunks = build_chunks(model_config(source.hf_config, arguments), groups)
        for parameter in chunks[0].parameters():
            parameter.fill_(float("nan"))  # what is left out shows
        steps: list[int] = []
        load_weights(chunks, source, on_bytes=steps.append)  # what is imported on the way, and files' headers
        before = bytes_read()
        load_weights(chunks, source)
        read = bytes_read() - before
        values = {name: parameter.detach().clone() for name, parameter in chunks[0].named_parameters()}
    return {"read": read, "values": values, "steps": steps, "held": sum(value.nbytes for value in values.values())}


def fail(outcome: str) -> str:
    """Rank 2 cannot read the second parameter of its turns."""
    import patches

    patches.apply()
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.conversion.shared_reading import read_in_turns
    from remit_megatron.runtime.errors import UserError

    def broken() -> torch.Tensor:
        raise UserError("x.safetensors", "no byte 7", "8") if outcome == "wrong" else OSError("gone")

    with process_groups() as groups:
        parameters: list[Any] = [(torch.nn.Parameter(torch.zeros(2)), lambda: torch.ones(2)) for _ in range(7)]
        if int(os.environ["RANK"]) == 2:
            parameters[6] = (parameters[6][0], broken)
        found = []
        try:
            for _, value in read_in_turns(parameters, groups.dp_cp):
                found.append(value)
        except (UserError, RuntimeError, OSError) as error:
            return f"{len(found)} {type(error).__name__}: {error}"
    return "nothing"


@pytest.fixture(scope="module")
def models(pool, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reading")
    changes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
    hf = make_llama(root / "hf", seed=1, tokenizer=make_tokenizer(root / "tokenizer"), **changes)
    pool.run(run_import, world_size=1, hf=str(hf), output=str(root / "checkpoint"))
    return {"huggingface": hf, "checkpoint": root / "checkpoint"}


@pytest.mark.parametrize("kind", ["huggingface", "checkpoint"])
@pytest.mark.parametrize("tp", [1, 2])
def test_every_byte_is_read_once(pool, models, kind, tp):
    (alone, *_) = pool.run(load, world_size=tp, model=str(models[kind]), tp=tp)
    ranks = pool.run(load, world_size=RANKS, model=str(models[kind]), tp=tp)
    for rank, found in enumerate(ranks):
        assert found["steps"][-1] == found["held"], "all of it was filled"
        if rank % tp == 0:
            assert all(torch.equal(value, alone["values"][name]) for name, value in found["values"].items())
    replicas = RANKS // tp
    whole = sum(found["held"] for found in ranks) / replicas
    read = sum(found["read"] for found in ranks)
    # Headers and metadata are read by every rank; the weights, of 5 MB, by one replica. Of a checkpoint a
    # tensor-parallel rank reads the stored piece that holds its part, here the whole of each weight.
    times = f"{read / whole:.2f} times the model over {replicas} replicas"
    assert whole > 1e6 and whole <= read < LIMITS[kind, tp] * whole, times


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ("wrong", ["UserError: x.safetensors: found no byte 7; expected 8"] * RANKS),
        ("failed", ["RuntimeError: reading weights failed on replica 2: OSError('gone')"] * RANKS),
    ],
)
def test_a_failure_is_one_of_all_replicas(pool, outcome, expected):
    expected = [f"4 {text}" for text in expected]
    if outcome == "failed":
        expected[2] = "4 OSError: gone"
    assert pool.run(fail, world_size=RANKS, outcome=outcome) == expected
