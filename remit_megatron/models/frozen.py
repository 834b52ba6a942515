"""What of a run's arguments belongs to the student's step, and is switched off for a model that only runs forward.

The reference shares the student's namespace: layout, dtype and kernels of the layers are the same. What serves
gradients, their memory or their communication would at best cost time there, and at worst share a buffer or a graph
with the student.
"""

from __future__ import annotations

from typing import Any

# Argument -> value that switches it off. A test builds every family with each of them set for the student.
STUDENT_STEP: dict[str, Any] = {
    # Graphs are captured for training microbatches: in the second step Megatron finds one chunk in two lists of layers.
    "cuda_graph_impl": "none",
    "cuda_graph_modules": [],
    "inference_cuda_graph_scope": None,
    # User buffers have one shape, by name, for the whole process: the student's micro-batch and hidden size.
    "tp_comm_overlap": False,
    # Nothing is kept for a backward pass; how many layers to recompute is counted in the student's.
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_modules": None,
    "distribute_saved_activations": False,
    "cpu_offloading": False,
    "cpu_offloading_num_layers": 0,
    "fine_grained_activation_offloading": False,
    "offload_modules": [],
    "delay_offload_until_cuda_graph": False,
    # Gradients of weights.
    "gradient_accumulation_fusion": False,
    "delay_wgrad_compute": False,
    "defer_embedding_wgrad_compute": False,
    "wgrad_deferral_limit": 0,
    # Statistics of the student's attention, which its optimizer reads.
    "qk_clip": False,
    "log_max_attention_logit": False,
    "init_model_with_meta_device": False,
}
