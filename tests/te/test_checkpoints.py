"""Distributed checkpoints between models of Transformer Engine's layers and of the local ones, and back to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import test_conversion as convert
from tests.te.machine import activate
from tests.te.models import LOCAL, TE, contents, ranks_of


def resave(sources: dict[str, str], outputs: dict[str, str], layout: str, layers: str) -> dict[str, list[str]]:
    """Loads each model and saves it as a training run does; the keys that were saved."""
    activate()
    import shutil

    from megatron.core import dist_checkpointing

    from remit_megatron.conversion.loading import sharded_weights
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.conversion.source import resolve
    from remit_megatron.runtime.checkpoints import write_manifest
    from tests.te.models import build, sizes_of

    keys: dict[str, list[str]] = {}
    with process_groups(**sizes_of(layout)) as groups:
        for case, path in sources.items():
            (chunk,) = build(path, groups, layout, layers)
            output = Path(outputs[case])
            if torch.distributed.get_rank() == 0:
                output.mkdir(parents=True)
            torch.distributed.barrier()
            dist_checkpointing.save({"model": sharded_weights(chunk), "iteration": 7}, str(output))
            keys[case] = sorted(dist_checkpointing.load_tensors_metadata(str(output)))
            if torch.distributed.get_rank() == 0:
                source = resolve(path)
                shutil.copytree(source.hf_files, output / "hf", ignore=shutil.ignore_patterns("*.safetensors*"))
                write_manifest(str(output), iteration=7)
            torch.distributed.barrier()
    return keys


def load_as_a_run(directories: dict[str, str], checkpoints: dict[str, str], layout: str, layers: str) -> None:
    """Through Megatron's own loader, with what layers keep beside their weights."""
    activate()
    from megatron.core import dist_checkpointing

    from remit_megatron.conversion.loading import sharded_weights
    from remit_megatron.conversion.processes import process_groups
    from tests.te.models import build, sizes_of

    with process_groups(**sizes_of(layout)) as groups:
        for case, directory in directories.items():
            (chunk,) = build(directory, groups, layout, layers)
            expected = {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()}
            for parameter in chunk.parameters():
                parameter.detach().fill_(float("nan"))
            loaded: Any = dist_checkpointing.load({"model": sharded_weights(chunk)}, checkpoints[case])
            chunk.load_state_dict(loaded["model"])
            for name, parameter in chunk.named_parameters():
                assert torch.equal(parameter, expected[name]), (case, name)


def import_model(hf: str, output: str) -> None:
    """``remit import``."""
    activate()
    convert.run_import(hf, output)


def export_model(checkpoint: str, output: str) -> None:
    """``remit export``."""
    activate()
    convert.run_export(checkpoint, output)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(("tp2", LOCAL), ("one", TE), id="local_tp2_to_te"),
        pytest.param(("tp2_sp", TE), ("one", LOCAL), id="te_tp2_to_local"),
        pytest.param(("one", TE), ("tp2_sp", TE), id="te_to_te_tp2"),
    ],
)
def test_checkpoints_go_both_ways(pool, models, tmp_path, first, second):
    """Every family: the same keys, through Megatron's loader and through ours, and back to the files bit for bit."""
    paths = {case: str(path) for case, path in models.items()}
    saved = {case: str(tmp_path / f"{case}_first") for case in models}
    again = {case: str(tmp_path / f"{case}_second") for case in models}
    keys = pool.run(
        resave, world_size=ranks_of(first[0]), sources=paths, outputs=saved, layout=first[0], layers=first[1]
    )[0]
    pool.run(
        load_as_a_run,
        world_size=ranks_of(second[0]),
        directories=paths,
        checkpoints=saved,
        layout=second[0],
        layers=second[1],
    )
    back = pool.run(
        resave, world_size=ranks_of(second[0]), sources=saved, outputs=again, layout=second[0], layers=second[1]
    )[0]
    assert keys == back
    for case, path in models.items():
        output = tmp_path / f"{case}_exported"
        pool.run(export_model, world_size=1, checkpoint=again[case], output=str(output))
        convert.same_model(path, output)


def test_an_import_is_a_checkpoint_of_either_layers(pool, models, tmp_path):
    """What ``remit import`` writes, which builds local layers, in a model of Transformer Engine's."""
    imported = {case: str(tmp_path / case) for case in models}
    for case, path in models.items():
        pool.run(import_model, world_size=1, hf=str(path), output=imported[case])
    arguments = {"layout": "tp2", "layers": TE}
    expected = pool.run(contents, world_size=2, directories={c: str(p) for c, p in models.items()}, **arguments)
    found = pool.run(contents, world_size=2, directories=imported, **arguments)
    for wanted, held in zip(expected, found, strict=True):
        for case in models:
            for name, entry in wanted[case].items():
                assert name == "modules" or torch.equal(entry["value"], held[case][name]["value"]), (case, name)
