"""``remit quickstart``: the method at toy size, every part real, in minutes on two CPU cores.

    arithmetic text -> a small base -> a reference -> mid-training of the base with ntp and with remit -> held-out loss

The text is noisy on purpose: a third of its answers are wrong. The reference is the same base trained further on
correct solutions only; the weights should then teach the student to listen less to the wrong ones.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from remit_megatron.runtime.errors import EXIT_DONE
from remit_megatron.runtime.files import write_atomic
from remit_megatron.runtime.installed import find_config
from remit_megatron.runtime.launch import launch
from remit_megatron.runtime.progress import format_duration
from remit_megatron.training.metrics import METRICS_FILE, VALIDATION_FILE, read_records

RUN_CONFIG = "configs/common/quickstart.yaml"
_WRONG_SHARE = 1 / 3
_STAGES = 6


@dataclass(frozen=True)
class Scale:
    """How much of everything. The default takes under six minutes on two cores."""

    documents: int = 20_000
    base_steps: int = 120
    reference_steps: int = 60
    midtrain_steps: int = 60
    nproc: int = 2


class Quickstart:
    """The chain of stages; each is a command that can be run by hand, and is printed as such."""

    def __init__(self, output: Path, scale: Scale, seed: int):
        self.output, self.scale, self.seed = output, scale, seed
        self._started = time.monotonic()
        self._stage = 0

    def run(self) -> int:
        """Runs all stages and prints the comparison."""
        self._say(
            "Text: sums of two numbers from reasoning-gym; in the training text a third of the answers are wrong."
        )
        self.write_text()
        self._say("Token files, and a tokenizer with one entry per character.")
        self.build_data()
        self._say(
            f"Base: a Llama of about 0.8M parameters, {self.scale.base_steps} steps of plain next-token prediction."
        )
        code = self._train("base", {"megatron.train_iters": self.scale.base_steps, "megatron.lr": 2e-3}, nproc=1)
        if code == EXIT_DONE:
            self._say(
                f"Reference: the base trained for {self.scale.reference_steps} more steps, on correct solutions only."
            )
            code = self.make_reference()
        for objective in ("ntp", "remit"):
            if code == EXIT_DONE:
                self._say(f"Mid-training of the base with {objective}, on {self.scale.nproc} ranks (tensor parallel).")
                code = self.midtrain(objective)
        if code == EXIT_DONE:
            self.report()
        return code

    # -- stages ------------------------------------------------------------------------------------------------------

    def write_text(self) -> None:
        """Writes text/train.jsonl (noisy), text/correct.jsonl and text/heldout.jsonl (correct)."""
        directory = self.output / "text"
        directory.mkdir(exist_ok=True)
        random_state = random.Random(self.seed)
        problems = arithmetic_problems(self.scale.documents, self.seed)
        split = len(problems) // 20
        heldout, train = problems[:split], problems[split:]
        for name, selected, wrong_share in (
            ("train", train, _WRONG_SHARE),
            ("correct", train, 0.0),
            ("heldout", heldout, 0.0),
        ):
            lines = []
            for question, answer in selected:
                wrong = random_state.random() < wrong_share
                error = random_state.choice((-10, -2, -1, 1, 2, 10)) if wrong else 0
                lines.append(json.dumps({"text": f"{question} {answer + error}"}))
            write_atomic(directory / f"{name}.jsonl", "\n".join(lines) + "\n")

    def build_data(self) -> None:
        """Makes the tokenizer and turns the text into token files."""
        from remit_megatron.data.build import build_dataset

        tokenizer = self.output / "tokenizer"
        make_character_tokenizer(tokenizer)
        (self.output / "data").mkdir(exist_ok=True)
        for name in ("train", "correct", "heldout"):
            build_dataset(
                [str(self.output / "text" / f"{name}.jsonl")],
                tokenizer=str(tokenizer),
                output=str(self.output / "data" / name),
                overwrite=True,
            )

    def make_reference(self) -> int:
        """Makes the model that guides: whatever comes out under ``reference/`` as a checkpoint of the same family.

        Here it is supervised training on correct solutions. Reinforcement learning with verifiable rewards takes this
        place without a change elsewhere.
        """
        overrides = {
            "init": self.output / "base",
            "data.train": json.dumps([[1.0, str(self.output / "data" / "correct")]]),
            "megatron.train_iters": self.scale.reference_steps,
            "megatron.lr": 1e-3,
        }
        return self._train("reference", overrides, nproc=1)

    def midtrain(self, objective: str) -> int:
        """Anneals the base on the noisy text with one objective."""
        overrides = {
            "init": self.output / "base",
            "objective.name": objective,
            "megatron.train_iters": self.scale.midtrain_steps,
            "megatron.lr": 1e-3,
        }
        if self.scale.nproc > 1:
            overrides["megatron.tensor_model_parallel_size"] = 2 if self.scale.nproc % 2 == 0 else 1
        if objective == "remit":
            overrides["reference.checkpoint"] = self.output / "reference"
        return self._train(objective, overrides, nproc=self.scale.nproc)

    def report(self) -> None:
        """Prints what came out."""
        rows = []
        for name in ("base", "reference", "ntp", "remit"):
            metrics = read_records(self.output / name / METRICS_FILE)
            validation = read_records(self.output / name / VALIDATION_FILE)
            last = metrics[-1]
            rows.append(
                (
                    name,
                    str(last["iteration"]),
                    f"{last['lm_loss']:.4f}",
                    f"{validation[-1]['lm_loss']:.4f}",
                    f"{last['weight_std']:.4f}",
                )
            )
        header = ("run", "steps", "training loss", "held-out loss", "spread of weights")
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in (header, *rows)
        ]
        self._write("")
        for line in lines:
            self._write("  " + line)
        self._write("")
        self._write(
            "Held-out: correct solutions of problems that are not in the training text; loss in nats per token."
        )
        self._write("One seed at toy size shows that every part works, not which objective is better.")
        elapsed = format_duration(time.monotonic() - self._started)
        self._write(f"Every step: {self.output / 'remit' / METRICS_FILE}. All of it took {elapsed}.")

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _train(self, name: str, overrides: dict[str, object], *, nproc: int) -> int:
        everywhere: dict[str, object] = {
            "run_dir": self.output / name,
            "data.tokenizer": self.output / "tokenizer",
            "data.train": json.dumps([[1.0, str(self.output / "data" / "train")]]),
            "data.valid": json.dumps([[1.0, str(self.output / "data" / "heldout")]]),
            "data.cache_dir": self.output / "data" / "cache",
            "seed": self.seed,
        }
        words = [f"{key}={value}" for key, value in (everywhere | overrides).items()]
        self._write(f"      remit train {RUN_CONFIG} run_dir={self.output / name} … --nproc {nproc}")
        return launch(nproc, ["train", str(find_config(RUN_CONFIG, announce=False)), *words])

    def _say(self, text: str) -> None:
        self._stage += 1
        elapsed = format_duration(time.monotonic() - self._started)
        self._write(f"[{self._stage}/{_STAGES}, {elapsed}] {text}")

    def _write(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def arithmetic_problems(count: int, seed: int) -> list[tuple[str, int]]:
    """Different problems from reasoning-gym: pairs of a question and its verified answer."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of its generators' dependencies warn on import
        import reasoning_gym

    dataset = reasoning_gym.create_dataset(
        "chain_sum", size=count, seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=2
    )
    problems: dict[str, int] = {}
    for item in dataset:
        question = item["question"].split(":", 1)[1].strip()
        problems[question] = int(item["answer"])
    return list(problems.items())


def make_character_tokenizer(directory: Path) -> None:
    """A tokenizer with one entry per printable character that the text can hold, and an end-of-document entry."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = list("0123456789+-*/=() .")
    vocabulary = {"<|endoftext|>": 0, "<|unknown|>": 1}
    for character in characters:
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<|endoftext|>"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "unk_token": "<|unknown|>"}
    write_atomic(directory / "tokenizer_config.json", json.dumps(settings) + "\n")
