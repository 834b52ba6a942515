"""The replicated reference: the numbers of the pipelined one, a step ahead, in the student's pauses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.run.configuration import load_config
from remit_megatron.run.prepare import prepare
from remit_megatron.runtime.errors import EXIT_START_ME_AGAIN, UserError
from tests.distributed.training.test_training import REMIT, configuration, train, train_rank
from tests.distributed.training.test_training import material as material  # a fixture

REPOSITORY = Path(__file__).resolve().parents[3]
STEPS = 7  # one warms up, three measure the pauses, and the last has nothing to look ahead to: two are filled
COMPARED = ("lm_loss", "objective_loss", "grad_norm", "weight_mean", "weight_std", "delta_mean", "delta_std")
PP2 = {"pipeline_model_parallel_size": 2}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_pp2": (4, PP2 | {"tensor_model_parallel_size": 2}),
    "tp2_sp_pp2": (4, PP2 | {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2_virtual2": (2, PP2 | {"num_layers_per_virtual_pipeline_stage": 1}),
    "cp2_pp2": (4, PP2 | {"context_parallel_size": 2}),
    "pp2_dp2": (4, PP2 | {"use_distributed_optimizer": True}),
}


def run(
    material,
    name: str,
    placement: str,
    *,
    objective: dict[str, Any] = REMIT,
    reference: dict[str, Any] | None = None,
    **megatron: Any,
) -> dict[str, Any]:
    """A run with its reference in a place."""
    folder = material["root"] / f"replicated_{name}_{placement}"
    config = configuration(material, folder, objective, **{"train_iters": STEPS, **megatron})
    config["reference"] |= {"placement": placement} | (reference or {})
    return config


def same(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """Bit for bit: on a CPU both placements run the same kernels on the same shapes."""
    assert len(expected) == len(found) == STEPS and found[0]["weight_std"] > 0.05
    for one, other in zip(expected, found, strict=True):
        assert {name: one[name] for name in COMPARED} == {name: other[name] for name in COMPARED}


def watched_rank(path: str) -> dict[str, Any]:
    """One rank of ``remit train``, and what its replicated reference did."""
    import patches

    patches.apply()
    from remit_megatron.reference.replicated import ReplicatedReference
    from remit_megatron.training.command import train as train_run

    found: dict[str, Any] = {"microbatches": []}
    enter, original = ReplicatedReference._enter, ReplicatedReference.__init__

    def counted(self, numbered):
        own = enter(self, numbered)
        found["microbatches"].append((len(numbered), len(own)))
        return own

    def kept(self, *args, **kwargs):
        original(self, *args, **kwargs)
        found["filler"], found["parts"] = self.filler, len(self.pieces)

    ReplicatedReference._enter, ReplicatedReference.__init__ = counted, kept  # type: ignore[method-assign]
    try:
        found["code"] = train_run(load_config(path))
    finally:
        ReplicatedReference._enter, ReplicatedReference.__init__ = enter, original  # type: ignore[method-assign]
    filler = found.pop("filler")
    return found | {"filled": filler.filled, "left_over": filler.left_over}


@pytest.fixture(scope="module")
def pipelined(pool, material) -> list[dict[str, Any]]:
    """The run that the others are compared with: two stages, the reference in the pipeline."""
    return train(pool, run(material, "pp2", "pipeline", **PP2), world_size=2)


def test_the_pauses_are_filled(pool, material, pipelined):
    config = run(material, "pp2", "replicated", **PP2)
    folder = Path(config["run_dir"])
    folder.mkdir(parents=True)
    (folder / "input.yaml").write_text(json.dumps(config))
    ranks = pool.run(watched_rank, world_size=2, path=str(folder / "input.yaml"))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    same(pipelined, metrics)
    for rank in ranks:
        assert rank["code"] == 0
        # Before the first step all four at once; in each step four ahead, of which this rank has two, and none late.
        assert rank["microbatches"] == [(4, 2)] + [(4, 2), (0, 0)] * (STEPS - 1) + [(0, 0)]
        assert (rank["filled"] + rank["left_over"]) == 2 * rank["parts"] * (STEPS - 1), "every part runs once"
    assert sum(rank["filled"] for rank in ranks) > 0, "two steps had pauses with a plan"
    assert "scoring ahead" in (folder / "logs" / "rank_0.log").read_text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_numbers_of_the_pipeline(pool, material, layout):
    world_size, megatron = LAYOUTS[layout]
    expected = train(pool, run(material, layout, "pipeline", **megatron), world_size=world_size)
    found = train(pool, run(material, layout, "replicated", **megatron), world_size=world_size)
    same(expected, found)


def test_larger_microbatches_of_the_reference(pool, material, pipelined):
    config = run(material, "merged", "replicated", reference={"micro_batch_size": 4}, **PP2)
    found = train(pool, config, world_size=2)
    for one, other in zip(pipelined, found, strict=True):
        for name in COMPARED:
            assert other[name] == pytest.approx(one[name], rel=1e-6, abs=1e-6), name


def test_a_selection_from_the_global_batch(pool, material):
    """Its schedule without gradients stands before the student's, in the same step."""
    objective = {"name": "rho1", "scope": "global_batch"}
    runs = [
        train(pool, run(material, "rho1", placement, objective=objective, **PP2), world_size=2)
        for placement in ("pipeline", "replicated")
    ]
    for one, other in zip(*runs, strict=True):
        assert {name: one[name] for name in COMPARED} == {name: other[name] for name in COMPARED}


def test_evaluations_and_a_resume_in_between(pool, material, pipelined):
    config = run(material, "resumed", "replicated", eval_interval=2, eval_iters=1, exit_interval=3, **PP2)
    config["data"]["valid"] = config["data"]["train"]
    folder = Path(config["run_dir"])
    folder.mkdir(parents=True)
    path = folder / "input.yaml"
    path.write_text(json.dumps(config))
    codes = [pool.run(train_rank, world_size=2, config={}, path=str(path))[0] for _ in range(3)]
    assert codes == [EXIT_START_ME_AGAIN, EXIT_START_ME_AGAIN, 0]
    same(pipelined, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert (folder / "validation.jsonl").exists()


def test_a_cache_is_written_on_the_way(pool, material, pipelined):
    from remit_megatron.reference.cache import ReferenceCache

    cache = material["root"] / "replicated_cache"
    config = run(material, "cache", "replicated", reference={"write_cache": True, "cache_dir": str(cache)}, **PP2)
    same(pipelined, train(pool, config, world_size=2))
    written = ReferenceCache.open(cache)
    ((dataset, _),) = written.datasets().items()
    assert written.completeness(dataset).sum() == STEPS * 8


def test_auto_measures_the_first_step(pool, material, pipelined):
    config = run(material, "pp2", "auto", **PP2)
    same(pipelined, train(pool, config, world_size=2))
    log = (Path(config["run_dir"]) / "logs" / "rank_1.log").read_text()
    assert log.count("reference.placement auto: replicated; all layers take") == 1
    assert "scoring ahead" in log, "it goes on as a replicated reference does"


def choose(free: list[float]) -> tuple[bool, str]:
    """What `AutoPlacement` makes of the memory that is free on each rank; 100 bytes of weights on each."""
    from types import SimpleNamespace

    import torch

    from remit_megatron.reference import placement
    from remit_megatron.runtime import parallel

    environment = parallel.rank_environment()
    parallel.initialize(environment)
    weights = torch.nn.Linear(25, 1, bias=False)
    pipeline: Any = SimpleNamespace(
        chunks=[weights],
        forward=SimpleNamespace(groups=SimpleNamespace(pp=torch.distributed.group.WORLD)),
        score=lambda *args, **kwargs: ["pipeline"],
    )
    replicated: Any = SimpleNamespace(score=lambda *args, **kwargs: ["replicated"])
    measured, placement.free_bytes = placement.free_bytes, lambda: free[environment.rank]
    try:
        auto = placement.AutoPlacement(pipeline, lambda: replicated)
        used: list[Any] = [auto.score(list, [[]])[0] for _ in range(3)]
    finally:
        placement.free_bytes = measured
    assert measured() > 1e6, "this machine has memory"
    return not pipeline.chunks, " ".join(used)


def test_auto_goes_by_the_rank_with_least_room(pool):
    freed = pool.run(choose, world_size=2, free=[100.0, 101.0])
    assert freed == [(True, "pipeline replicated replicated")] * 2
    freed = pool.run(choose, world_size=2, free=[1e9, 99.0])
    assert freed == [(False, "pipeline pipeline pipeline")] * 2


def scored_alike(model: str, fetched: int) -> dict[str, Any]:
    """Scores of a step whose microbatches were only partly known a step ahead, by both placements."""
    import patches

    patches.apply()
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection

    from remit_megatron.conversion.source import resolve
    from remit_megatron.models.build import default_arguments
    from remit_megatron.models.forward import ModelForward
    from remit_megatron.reference.idle import IdleFiller
    from remit_megatron.reference.live import LiveReference
    from remit_megatron.reference.replicated import ReplicatedReference
    from remit_megatron.runtime import parallel

    environment = parallel.rank_environment()
    parallel.initialize(environment)
    parallel_state.initialize_model_parallel(1, environment.world_size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    forward = ModelForward(eod_id=0, groups=lambda: groups, document_mask=True)
    source, arguments = resolve(model), default_arguments(pipeline_model_parallel_size=environment.world_size)
    filler = IdleFiller()
    replicated = ReplicatedReference.load(source, arguments, forward=forward, filler=filler)
    pipeline = LiveReference.load(source, arguments, forward=forward)
    generator = torch.Generator().manual_seed(0)
    items = []
    for _ in range(5):
        text = torch.randint(0, 50, (2, 33), generator=generator)
        items.append({"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(2, 32)})
    settings = {"seq_length": 32, "micro_batch_size": 2}
    student: Any = pipeline.chunks[0]
    with replicated.ahead(items[:fetched], microbatches=4, model=[student]):
        early = filler.filled + filler.left_over
    scores = replicated.score(get_forward_backward_func(), [items], **settings)
    expected = pipeline.score(get_forward_backward_func(), [items], **settings)
    return {
        "early": early + filler.left_over,
        "parts": len(replicated.pieces),
        "equal": [torch.equal(one, other) for one, other in zip(scores, expected, strict=True)],
        "left": len(replicated._entries),
    }


@pytest.mark.parametrize("fetched", [0, 3, 5])
def test_more_microbatches_than_were_read_ahead(pool, material, fetched):
    ranks = pool.run(scored_alike, world_size=2, model=str(material["reference"]), fetched=fetched)
    assert [rank["equal"] for rank in ranks] == [[], [True] * 5], "on the last stage"
    own = {0: (0, 0), 3: (2, 1), 5: (3, 2)}[fetched]
    assert [rank["early"] for rank in ranks] == [
        number * rank["parts"] for number, rank in zip(own, ranks, strict=True)
    ]
    assert [rank["left"] for rank in ranks] == [0, 0]


def in_parts(model: str, sequence_parallel: bool) -> list[bool]:
    """Hidden states before the head, of the model in one call and in parts."""
    import patches

    patches.apply()
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from remit_megatron.conversion.loading import load_weights
    from remit_megatron.conversion.source import resolve
    from remit_megatron.models.build import build_chunks, default_arguments, model_config
    from remit_megatron.reference.replicated import cut
    from remit_megatron.runtime import parallel

    environment = parallel.rank_environment()
    parallel.initialize(environment)
    parallel_state.initialize_model_parallel(environment.world_size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    source = resolve(model)
    arguments = default_arguments(
        tensor_model_parallel_size=environment.world_size, sequence_parallel=sequence_parallel
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    (chunk,) = build_chunks(model_config(source.hf_config, arguments), groups)
    load_weights([chunk], source)
    tokens = torch.randint(0, 50, (2, 32), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(32).expand_as(tokens)

    def processor(*, hidden_states, output_weight, output_layer, **_):
        kept.append(hidden_states)
        assert (output_layer.weight if output_weight is None else output_weight) is not None
        return hidden_states

    kept: list[torch.Tensor] = []
    same = []
    for stages in (1, 2, 8):
        pieces = cut(chunk, stages=stages)
        assert len(pieces) == {1: 3, 2: 3, 8: 3}[stages], "two layers and the head"
        with torch.no_grad():
            chunk(tokens, positions, None, output_processor=processor)
            hidden = None
            for piece in pieces:
                hidden = piece(tokens, positions, None, decoder_input=hidden, output_processor=processor)
        same.append(torch.equal(kept[-1], kept[-2]) and len(kept) % 2 == 0)
    # The model itself is as it was.
    chunk(tokens, positions, None, output_processor=processor)
    return [*same, torch.equal(kept[-1], kept[0])]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_parts_give_the_hidden_states_of_the_whole(pool, material, world_size, tied):
    from tests.tiny import make_llama

    folder = material["root"] / f"parts_{tied}"
    if not folder.exists():
        make_llama(folder, seed=4, tokenizer=material["tokenizer"], tie_word_embeddings=tied, num_hidden_layers=2)
    ranks = pool.run(in_parts, world_size=world_size, model=str(folder), sequence_parallel=world_size == 2)
    assert ranks == [[True] * 4] * world_size


def refused(config: dict[str, Any]) -> str:
    """What a run says before it starts."""
    folder = Path(config["run_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "input.yaml").write_text(json.dumps(config))
    with pytest.raises(UserError) as failure:
        prepare(load_config(folder / "input.yaml"), world_size=2)
    return str(failure.value)


def test_what_cannot_be_replicated_is_refused(material):
    line = refused(run(material, "kd", "replicated", objective={"name": "kd"}, **PP2))
    assert line.startswith("reference.placement: found replicated; expected pipeline: kd needs whole distributions")
    line = refused(run(material, "rerun", "replicated", rerun_mode="validate_results", **PP2))
    assert "rerun_mode validate_results" in line


@pytest.mark.slow
def test_the_benchmark_writes_its_record(tmp_path):
    command = [
        sys.executable,
        str(REPOSITORY / "scripts" / "bench_pipeline.py"),
        "--stages",
        "2",
        "--cases",
        "2:1",
        "2:2",
    ]
    command += ["--rounds", "1", "--forward-ms", "2", "--record", str(tmp_path)]
    subprocess.run(command, check=True, timeout=600, capture_output=True, cwd=REPOSITORY)
    assert (tmp_path / "pipeline.md").read_text().count("| replicated |") == 2
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("pipeline-*.json"))
    rows = record["rows"]
    assert [(row["microbatches"], row["virtual"], row["arm"]) for row in rows] == [
        (2, virtual, arm) for virtual in (1, 2) for arm in ("student", "pipeline", "replicated")
    ]
    assert [row["ideal"] for row in rows] == [9.0, 12.0, 9.0, 7.5, 10.0, 8.0]
    for row in rows:
        assert row["seconds"] > 0 and row["ratio"] == pytest.approx(row["passes"] / row["ideal"])
