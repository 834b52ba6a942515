"""The ranks of gpu_parity.py: what Megatron makes of its cases, on one layout after the other.

Everything but layout and precision is what `remit train` would take on this machine, by its own words. Truth lies in
files: losses of transformers, and its gradients as if they were the weights of a model, so that each rank loads those
of its own shards through the family's table and compares in place.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import benchmarking  # noqa: F401 - what must stand in the environment before the driver starts
import torch

import patches

patches.apply()

from megatron.core import parallel_state  # noqa: E402

# Layout -> its Megatron arguments. Stages exchange packed sequences one to a microbatch.
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_virtual": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    "cp2": {"context_parallel_size": 2},
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    "tp2_cp2": {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True},
}
SHOWN = ("apply_rope_fusion", "gradient_accumulation_fusion")
SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def ranks_of(layout: str) -> int:
    """Processes of a layout."""
    tp, pp, cp = (LAYOUTS[layout].get(size, 1) for size in SIZES)
    return tp * pp * cp


def run_arguments(hf_config: dict[str, Any], layout: str, dtype: str, *, sequences: int, length: int) -> Any:
    """Megatron's arguments as a run on this machine would have them."""
    from remit_megatron.models.build import megatron_arguments
    from remit_megatron.run.configuration import load_config
    from remit_megatron.run.megatron_args import build_arguments
    from remit_megatron.runtime.parallel import rank_environment

    environment = rank_environment()
    megatron = {
        "seq_length": length,
        "micro_batch_size": 1 if "pipeline_model_parallel_size" in LAYOUTS[layout] else 2,
        "global_batch_size": sequences,
        "train_iters": 1,
        "lr": 1e-5,
        "bf16": dtype == "bfloat16",
        **LAYOUTS[layout],
    }
    values = {
        "model": hf_config,
        "objective": {"name": "ntp"},
        "data": {"train": [[1.0, "unused"]], "tokenizer": "unused"},
        "megatron": megatron,
        "run_dir": "unused",
        "logging": {"tensorboard": False},
        "checkpoint": {"resume": "never"},
    }
    path = Path(f"{sys.argv[1]}/run-{environment.rank}.yaml")
    path.write_text(json.dumps(values))  # JSON is YAML
    world = {"world_size": environment.world_size, "rank": environment.rank, "local_rank": environment.local_rank}
    return build_arguments(load_config(path), megatron_arguments(hf_config), **world)


@contextmanager
def groups_of(arguments: Any) -> Iterator[Any]:
    """Megatron's groups of a layout, on the process group that stays."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        virtual_pipeline_model_parallel_size=arguments.virtual_pipeline_model_parallel_size,
        **{size: getattr(arguments, size) for size in SIZES},
    )
    try:
        model_parallel_cuda_manual_seed(1)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()


class Case:
    """A model, a batch, and what transformers makes of them (gpu_parity.py writes it)."""

    def __init__(self, folder: Path, dtype: str):
        from safetensors.torch import load_file

        from remit_megatron.conversion.source import resolve

        self.source = resolve(folder / "model")
        self.gradient = resolve(folder / "gradient")
        tensors = load_file(folder / "truth.safetensors")
        self.ids, self.documents, self.counted = tensors["ids"], tensors["documents"], tensors["counted"]
        self.losses, self.dtype = tensors["losses"], dtype

    def microbatches(self, size: int) -> list[dict[str, torch.Tensor]]:
        """Items as a data loader gives them."""
        whole = {
            "tokens": self.ids,
            "labels": self.ids.roll(-1, dims=1),
            "loss_mask": self.counted.float(),
            "document_ids": self.documents,
        }
        parts = (
            {name: t[first : first + size] for name, t in whole.items()} for first in range(0, len(self.ids), size)
        )
        return [{name: tensor.contiguous() for name, tensor in part.items()} for part in parts]


class Layout:
    """A case on a layout: reference and student of the same weights."""

    def __init__(self, case: Case, groups: Any, arguments: Any):
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from remit_megatron.models.family import family_of
        from remit_megatron.models.forward import ModelForward
        from remit_megatron.reference.live import LiveReference

        self.case, self.groups, self.arguments = case, groups, arguments
        self.layers = arguments.transformer_impl
        self.forward = ModelForward(
            eod_id=-1,
            groups=lambda: groups,
            document_mask=bool(case.documents.any()),
            packed_attention=self.layers == "transformer_engine",
        )
        self.schedule = get_forward_backward_func()
        self.chunks = arguments.virtual_pipeline_model_parallel_size or 1
        self.last = groups.pp.rank() == groups.pp.size() - 1
        self.items = case.microbatches(arguments.micro_batch_size)
        self.sizes = {"seq_length": case.ids.shape[1], "micro_batch_size": arguments.micro_batch_size}
        self.names = family_of(case.source.hf_config).names(case.source.hf_config)
        self.reference = LiveReference.load(case.source, arguments, forward=self.forward)
        self.models = self._student()
        self.truth = self._true_gradients()

    def scores(self, placement: str) -> dict[str, float]:
        """Errors of a reference's losses: their sum and number, and the largest."""
        from remit_megatron.models.batch import sequence_slice
        from remit_megatron.reference.idle import IdleFiller
        from remit_megatron.reference.replicated import ReplicatedReference

        reference = self.reference
        if placement == "replicated":
            settings: dict[str, Any] = {"filler": IdleFiller(group=lambda: self.groups.tp_cp), "forward": self.forward}
            reference = ReplicatedReference.load(self.case.source, self.arguments, **settings)
        buffers = [[dict(item) for item in self.items] for _ in range(self.chunks)]
        found = reference.score(self.schedule, buffers, **self.sizes)
        if not self.last:
            return {"sum": 0.0, "count": 0, "largest": 0.0}
        cp = self.groups.cp
        truth, counted = (sequence_slice(t, cp.rank(), cp.size()) for t in (self.case.losses, self.case.counted))
        error = (torch.cat(found).cpu() - truth).abs()[counted.bool()].double()
        return {"sum": error.sum().item(), "count": error.numel(), "largest": error.max().item()}

    def _student(self) -> list[Any]:
        """The model's chunks as a run has them, but for the optimizer."""
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        from remit_megatron.conversion.loading import load_weights
        from remit_megatron.models.build import build_chunks, model_config

        chunks = build_chunks(model_config(self.case.source.hf_config, self.arguments), self.groups)
        load_weights(chunks, self.case.source)
        in_float32 = bool(self.arguments.accumulate_allreduce_grads_in_fp32)
        models = []
        for chunk in chunks:
            chunk.train().requires_grad_(True)
            chunk.config.finalize_model_grads_func = finalize_model_grads
            ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=in_float32)
            models.append(DistributedDataParallel(chunk.config, ddp, chunk))
        return models

    def step(self, objective: str) -> tuple[dict[str, tuple[float, float]], float | None]:
        """Squares of the gradients' errors and of the true gradients, of this rank's shards, by the name of the weight;
        and the step's mean loss where it is known.

        Args:
            objective: "ntp", or "kd" with half of that: its divergence from a reference of the same weights is 0, and
                so is that one's gradient.
        """
        from remit_megatron.objectives import build_objective
        from remit_megatron.reference.live import LiveReference
        from remit_megatron.training.step import TrainingStep

        share = 0.5 if objective == "kd" else 1.0
        settings: dict[str, Any] = {"vocab_size": self.case.source.hf_config["vocab_size"], "forward": self.forward}
        if objective == "kd":
            reference = LiveReference(self.reference.chunks, signal="hidden", **settings)
            settings["scores"] = lambda: reference
            settings["objective"] = build_objective("kd", temperature=2.0, ntp_weight=share)
        else:
            settings["objective"] = build_objective("ntp")
        for model in self.models:
            model.zero_grad_buffer()
        step, several = TrainingStep(**settings), len(self.models) > 1
        iterators = [iter([dict(item) for item in self.items]) for _ in self.models]
        reports = step.wrap_schedule(self.schedule)(
            forward_step_func=step.forward_step,
            data_iterator=iterators if several else iterators[0],
            model=self.models if several else self.models[0],
            num_microbatches=len(self.items),
            forward_only=False,
            **self.sizes,
        )
        return self._squares(share), reports[0]["lm_loss"].item() if reports else None

    def _true_gradients(self) -> dict[Any, torch.Tensor]:
        """Those of this rank's shards, by layer and local name of the weight: float32, through the family's table."""
        from remit_megatron.conversion.loading import load_weights, weights_of
        from remit_megatron.models.build import build_chunks, default_arguments, model_config, unwrap

        like = {size: getattr(self.arguments, size) for size in (*SIZES, "sequence_parallel")}
        arguments = default_arguments(
            virtual_pipeline_model_parallel_size=self.arguments.virtual_pipeline_model_parallel_size,
            make_vocab_size_divisible_by=self.arguments.make_vocab_size_divisible_by,
            use_cpu_initialization=not torch.cuda.is_available(),  # on a GPU what ranks share goes through NCCL
            **like,
        )
        truth = build_chunks(model_config(self.case.source.hf_config, arguments), self.groups)
        load_weights(truth, self.case.gradient)
        return {
            (layer, weight.local): parameter
            for chunk in truth
            for _, layer, weight, parameter in weights_of(unwrap(chunk), self.names)
        }

    def _squares(self, share: float) -> dict[str, tuple[float, float]]:
        from remit_megatron.conversion.loading import weights_of
        from remit_megatron.models.build import unwrap

        squares = {}
        for model in self.models:
            for _, layer, weight, parameter in weights_of(unwrap(model), self.names):
                wanted = self.truth[layer, weight.local].double() * share
                error = parameter.main_grad.double() - wanted
                name = " ".join(self.names.hf_names(layer, weight))
                squares[name] = (error.square().sum().item(), wanted.square().sum().item())
        assert len(squares) == len(self.truth), "every true gradient has its weight"
        return squares


def measure(case: Case, layout: str) -> dict[str, Any]:
    """All figures of a case on a layout, the same on every rank."""
    from remit_megatron.runtime.parallel import gather_objects

    sequences, length = case.ids.shape
    arguments = run_arguments(case.source.hf_config, layout, case.dtype, sequences=sequences, length=length)
    placements = ["pipeline", *(["replicated"] if arguments.pipeline_model_parallel_size > 1 else [])]
    with groups_of(arguments) as groups:
        work = Layout(case, groups, arguments)
        losses = {placement: gather_objects(work.scores(placement)) for placement in placements}
        students = {objective: gather_objects(work.step(objective)) for objective in ("ntp", "kd")}
    means = [mean for ranks in students.values() for _, mean in ranks if mean is not None]
    counted = case.counted.bool()
    return {
        "layers": work.layers,
        "settings": {key: bool(getattr(arguments, key)) for key in SHOWN},
        "losses": {
            placement: {
                "mean": sum(one["sum"] for one in found) / sum(one["count"] for one in found),
                "largest": max(one["largest"] for one in found),
            }
            for placement, found in losses.items()
        },
        "mean_loss_error": max(abs(mean - case.losses[counted].double().mean().item()) for mean in means),
        "gradients": {objective: relative([own for own, _ in ranks]) for objective, ranks in students.items()},
    }


def relative(ranks: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Norm of each gradient's error over its own norm, from the squares of all ranks' shards."""
    squares: dict[str, tuple[float, float]] = {}
    for own in ranks:
        for name, pair in own.items():
            old = squares.get(name, (0.0, 0.0))
            squares[name] = (old[0] + pair[0], old[1] + pair[1])
    return {name: (error / true) ** 0.5 for name, (error, true) in squares.items() if true}


def main(folder: str) -> int:
    """Runs the jobs in FOLDER/jobs.json one after the other; rank 0 adds a line to FOLDER/results.jsonl for each."""
    from remit_megatron.runtime.parallel import initialize, rank_environment

    logging.disable(logging.WARNING)
    environment = rank_environment()
    initialize(environment)
    torch.set_float32_matmul_precision("highest")
    for job in json.loads(Path(folder, "jobs.json").read_text()):
        figures = measure(Case(Path(job["case"]), job["dtype"]), job["layout"])
        if environment.rank == 0:
            with Path(folder, "results.jsonl").open("a") as file:
                file.write(json.dumps(job | figures) + "\n")
        gc.collect()  # a model's hooks hold it
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
