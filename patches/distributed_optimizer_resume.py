"""The distributed optimizer can be resumed without Transformer Engine or apex.

Target    megatron-core 0.19.2, megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict,
          .load_state_dict and ._set_main_param_and_optimizer_states
Why       Three faults on the way of torch's own Adam. Loading begins by asking the optimizer for its state: the step is
          read from the states of the parameters, a fresh optimizer has none, ``assert len(steps) == 1`` ends the job.
          The reshardable format leaves ``step`` out, but the copy into place looks it up: ``KeyError: 'step'``. And the
          loaded step is one tensor for all parameters, which Adam then advances once for each of them: the bias
          correction is gone and the run silently differs from one that was not stopped.
Test      tests/integration/test_resume.py::test_distributed_optimizer_resumes_on_another_layout
Upstream  not reported
Drop when the distributed optimizer resumes with torch's Adam by itself
"""

from __future__ import annotations

import functools
from collections import defaultdict

import torch

from patches import Patch


def _install() -> None:
    from megatron.core.optimizer import distrib_optimizer

    optimizer_class = distrib_optimizer.DistributedOptimizer
    original = optimizer_class.state_dict

    @functools.wraps(original)
    def state_dict(self):
        if len(self.optimizer.state) == 0 and not self.ddp_config.use_megatron_fsdp:
            # Megatron's own loading allocates the states; the checkpoint's values replace them.
            groups = self.optimizer.state_dict()["param_groups"]
            fresh = [{**{k: v for k, v in group.items() if k != "params"}, "step": 0} for group in groups]
            self.load_state_dict({"optimizer": {"param_groups": fresh}})
        return original(self)

    optimizer_class.state_dict = state_dict

    copy_into_place = optimizer_class._set_main_param_and_optimizer_states

    @functools.wraps(copy_into_place)
    def set_main_param_and_optimizer_states(self, model_param, tensors):
        # What is no tensor is passed over; the step has been loaded with the parameter groups.
        copy_into_place(self, model_param, defaultdict(lambda: None, tensors))

    optimizer_class._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states

    load = optimizer_class.load_state_dict

    @functools.wraps(load)
    def load_state_dict(self, state_dict):
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    optimizer_class.load_state_dict = load_state_dict


def _without_fused_optimizers() -> bool:
    from megatron.core.optimizer import distrib_optimizer

    return not distrib_optimizer.HAVE_APEX_OR_TE


PATCH = Patch(
    name="distributed_optimizer_resume",
    target="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict, .load_state_dict",
    package="megatron-core",
    versions=("0.19.2",),
    why="with torch's own Adam resuming fails, and once it does not, all parameters share one step counter",
    test="tests/integration/test_resume.py::test_distributed_optimizer_resumes_on_another_layout",
    upstream="not reported",
    drop_when="the distributed optimizer resumes with torch's Adam by itself",
    install=_install,
    needed=_without_fused_optimizers,
)
