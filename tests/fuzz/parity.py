"""One random model: transformers' log-probabilities beside ours, or why either of them takes no such model."""

from __future__ import annotations

import json
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remit_megatron.runtime.errors import UserError

LENGTH = 24
ROWS = 2


@dataclass(frozen=True)
class Outcome:
    """What came of a config.json.

    Attributes:
        kind: ``equal``; ``refused`` by us; ``unknown to transformers`` and not refused by us. ``differs``, ``other
            shapes`` and ``traceback`` must not be.
        detail: the field that we refuse, the largest difference in nats, or the traceback.
        transformers: what transformers said if it takes no such model.
    """

    kind: str
    detail: str
    transformers: str | None = None


def compare(directory: Path, config: dict[str, Any], *, seed: int, tolerance: float = 1e-5) -> Outcome:
    """Makes a model of a config.json in ``directory`` and scores random tokens with both programs, in float32."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tokens, theirs, refusal = None, None, None
    try:
        vocabulary = write_weights(directory, seed=seed)
        tokens = torch.randint(0, vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
        theirs = transformers_logprobs(directory, tokens)
    except Exception as error:  # whatever transformers raises for a file that it does not take
        refusal = f"{type(error).__name__}: {str(error)[:200]}"
        if not (directory / "model.safetensors").exists():
            plain = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
            write_weights(directory, seed=seed, config={"model_type": "llama", "vocab_size": 131, **plain})
        tokens = torch.randint(0, 90, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    try:
        ours = our_logprobs(directory, tokens)
    except UserError as error:
        if str(directory / "config.json") not in error.field and str(directory) in error.field:
            # The model that we made of config.json is not the one that the weights were made for.
            return Outcome("unknown to transformers" if refusal else "other shapes", str(error), refusal)
        return Outcome("refused", error.field.split()[-1], refusal)
    except Exception:
        return Outcome("traceback", traceback.format_exc(), refusal)
    if theirs is None:
        return Outcome("unknown to transformers", "", refusal)
    difference = (ours - theirs).abs().max().item()
    assert theirs.std() > 0.1, "log-probabilities of a size that errors would show in"
    # Not "> tolerance": NaN is a difference, too.
    return Outcome("equal" if difference <= tolerance else "differs", f"{difference:.2g}")


def write_weights(directory: Path, *, seed: int, config: dict[str, Any] | None = None) -> int:
    """Random weights, biases and norms among them, of the model that transformers makes of config.json; returns the
    size of its vocabulary."""
    import safetensors.torch
    import transformers

    if config is None:
        described = transformers.AutoConfig.from_pretrained(directory)
    else:
        described = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(described).float()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():  # each tied weight once, under the embedding's name
        matrix, norm = parameter.ndim > 1, "norm" in name
        mean, deviation = (0.0, 0.15) if matrix else (1.0, 0.2) if norm else (0.0, 0.5)
        tensors[name] = torch.empty_like(parameter).normal_(mean, deviation, generator=generator)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return model.get_input_embeddings().num_embeddings


def transformers_logprobs(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """[b, s - 1] log-probabilities of each next token."""
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(f"the weights that were made of this configuration do not load: {report}")
    with torch.no_grad():
        logits = model.eval()(tokens[:, :-1], return_dict=True).logits
    return logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def our_logprobs(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The same through Megatron, as `remit logprobs` computes them."""
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.conversion.source import resolve
    from remit_megatron.scoring.logprobs import Scorer, microbatches

    source = resolve(directory)
    with process_groups(alone=True) as groups:
        scored = Scorer(source, groups, tp=1, pp=1).score(microbatches(tokens.tolist(), batch_tokens=8192))
    return torch.tensor([scored[row] for row in range(len(tokens))])


def quiet() -> None:
    """Silences what transformers says of the odd files on purpose."""
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
