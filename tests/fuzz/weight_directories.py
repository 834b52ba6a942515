"""Directories with weights in more than one file: each holds numbers of its own, so that it shows which were taken.

The files are those that directories of this kind have: one file, shards with an index, a stale index, adapters, the
weights in another program's spelling, precisions under other names. What transformers makes of each is the measure.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hypothesis import strategies as st

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 5,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
LAYER = "model.layers.0."
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (5, 4),
    "lm_head.weight": (5, 4),
    "model.norm.weight": (4,),
    f"{LAYER}self_attn.q_proj.weight": (4, 4),
    f"{LAYER}self_attn.k_proj.weight": (2, 4),
    f"{LAYER}self_attn.v_proj.weight": (2, 4),
    f"{LAYER}self_attn.o_proj.weight": (4, 4),
    f"{LAYER}mlp.gate_proj.weight": (6, 4),
    f"{LAYER}mlp.up_proj.weight": (6, 4),
    f"{LAYER}mlp.down_proj.weight": (4, 6),
    f"{LAYER}input_layernorm.weight": (4,),
    f"{LAYER}post_attention_layernorm.weight": (4,),
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Directory:
    """What is in one.

    Attributes:
        config: content of config.json.
        weights: name of a safetensors file -> tensors.
        texts: name of another file -> JSON.
    """

    config: dict[str, Any]
    weights: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    texts: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> Path:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for name, content in {"config.json": self.config, **self.texts}.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(json.dumps(content))
        for name, tensors in self.weights.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(tensors, directory / name, metadata={"format": "pt"})
        return directory


def tensors(seed: int, dtype: torch.dtype, names: Any = tuple(SHAPES)) -> dict[str, torch.Tensor]:
    """Random weights with these names; ``seed`` is the model's."""
    generator = torch.Generator().manual_seed(seed)
    whole = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return {name: whole[name] for name in names}


@st.composite
def directories(draw: Any) -> Directory:
    """Any mixture of what such directories hold."""
    config = dict(CONFIG)
    tied = draw(st.sampled_from((True, False, None)))
    if tied is not None:
        config["tie_word_embeddings"] = tied
    for key in ("dtype", "torch_dtype"):
        if draw(st.integers(0, 2)) == 0:
            config[key] = draw(st.sampled_from(("float32", "bfloat16", "float16")))
    found = Directory(config)
    parts = st.sampled_from(("one", "one", "shards", "shards", "other", "adapter", "consolidated", "variant", "folder"))
    for number, part in enumerate(draw(st.lists(parts, min_size=1, max_size=4, unique=True))):
        _add(draw, found, part, seed=number)
    if draw(st.integers(0, 7)) == 0:
        config["transformers_weights"] = draw(st.sampled_from((*found.weights, *found.texts, "nowhere.safetensors")))
    return found


def _model(draw: Any, seed: int, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A model's tensors: with a head that is or is not the embedding, with buffers, once in a while not complete."""
    values = tensors(seed, draw(st.sampled_from(_DTYPES)))
    head = draw(st.sampled_from(("own", "none", "same", "wide", "only")))
    if not config.get("tie_word_embeddings") and draw(st.integers(0, 3)):
        head = "own"
    if head in ("none", "only"):
        values.pop(HEAD if head == "none" else EMBEDDING)
    elif head != "own":
        copy = values[EMBEDDING].clone()
        values[HEAD] = copy if head == "same" else copy.to(torch.float32)
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from((f"{LAYER}self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")))
        values[name] = torch.ones(2, dtype=draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16))))
    if draw(st.integers(0, 9)) == 0:
        values.pop(draw(st.sampled_from(sorted(values))))
    if draw(st.integers(0, 9)) == 0:
        values[draw(st.sampled_from(sorted(values)))] = torch.ones(3, 2)
    return values


def _add(draw: Any, found: Directory, part: str, *, seed: int) -> None:
    if part == "adapter":
        found.weights["adapter_model.safetensors"] = {"base_model.model.x.lora_A.weight": torch.ones(2, 2)}
        return
    values = _model(draw, seed, found.config)
    if part != "shards":
        name = {"one": "model", "other": "weights", "consolidated": "consolidated.00", "variant": "model.fp16"}
        found.weights[f"{name.get(part, 'sub/model')}.safetensors"] = values
        return
    names = sorted(values)
    count = draw(st.integers(1, 3))
    files = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
    place = {name: files[draw(st.integers(0, count - 1))] for name in names}
    for file in files:
        found.weights[file] = {name: values[name] for name in names if place[name] == file}
    if draw(st.integers(0, 4)) == 0:  # a second copy in another file, which the index does not speak of
        name, file = draw(st.sampled_from(names)), draw(st.sampled_from(files))
        found.weights[file][name] = tensors(seed + 9, values[name].dtype).get(name, values[name])
    if draw(st.integers(0, 6)) == 0:  # an index that says less, or more, than the files hold
        name = draw(st.sampled_from(names))
        place.pop(name) if draw(st.booleans()) else place.update({f"{name}_scale": files[0]})
    if draw(st.integers(0, 9)) == 0:
        found.weights.pop(files[-1])
    found.weights = {name: held for name, held in found.weights.items() if held}
    index = {"metadata": {"total_size": 1}, "weight_map": place}
    found.texts["model.safetensors.index.json"] = index
