"""Run directories of long and eventful runs, written without training anything."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECIPE = """\
model: {{name: /models/llama, task: causal-lm}}
quantization: nf4
method: {{kind: lora, rank: {rank}, alpha: 16}}
data: {{train: /data/train.jsonl, eval: /data/test.jsonl}}
train: {{steps: {steps}, learning_rate: {rate}, max_grad_norm: 1.0}}
evaluate: {{every_steps: 100, choices: [" cat", " dog"]}}
parallel: {{strategy: fsdp, offload: none}}
"""


@dataclass
class Story:
    """What a run went through; every figure follows from it and a seed."""

    steps: int = 400
    ranks: int = 4
    rank: int = 8
    rate: float = 1e-3
    seed: int = 0
    gpus: int = 0
    per_rank: bool = True
    """Whether steps tell the time and the memory of every rank."""
    interrupted_at: tuple[int, ...] = ()
    """Steps after which an attempt was interrupted, and the next one went on."""
    cut_off_at: tuple[int, ...] = ()
    """Steps after which an attempt was killed; the next one begins 10 steps earlier."""
    skipped: tuple[int, ...] = ()
    save_failed: tuple[int, ...] = ()
    slow_rank: int | None = None
    finished: bool = True
    evaluate_every: int = 100
    prefers: bool = False
    """Whether steps tell the rewards of an objective that compares answers."""
    samples: tuple[dict[str, Any], ...] = ()
    records: list[dict[str, Any]] = field(default_factory=list)


class _Writer:
    def __init__(self, story: Story) -> None:
        self.story, self.dice = story, random.Random(story.seed)
        self.attempt, self.now, self.zero = 0, 1.8e9, 0.0
        self.loss = 3.0

    def tell(self, event: str, step: int, seconds: float = 0.0, **facts: Any) -> None:
        self.now += seconds
        stamp = {"attempt": self.attempt, "time": self.now, "at_s": self.now - self.zero}
        self.story.records.append({**stamp, "event": event, "step": step, **facts})

    def start(self, step: int) -> None:
        self.attempt += 1
        self.zero = self.now + 2.0
        story = self.story
        self.now = self.zero
        self.tell(
            "start", step, 20.0, steps=story.steps, world_size=story.ranks, strategy="fsdp",
            startup_s=9.0, load_s=10.0, launched=self.zero - 1.0, device="cuda" if story.gpus
            else "cpu", hosts=["node1", "node2"], slurm_job_id="4242",
            slurm_restart_count=self.attempt - 1, versions={"torch": "2.13.0", "peft": "0.21.0"},
            base_parameters=8_000_000_000,
            base_bytes_per_rank=[4_500_000_000 // story.ranks] * story.ranks,
        )  # fmt: skip

    def step(self, step: int) -> None:
        story, dice = self.story, self.dice
        self.loss += (0.4 + story.rate * 50 - self.loss) * 20 / story.steps
        if step in story.skipped:
            reason = f"loss nan, gradient norm 3.1 at step {step}"
            self.tell("skipped", step, 0.4, reason=reason, rows=16, cursor=step * 16, tokens=4096)
            return
        facts: dict[str, Any] = {}
        if story.per_rank:
            times = [0.30 + dice.random() * 0.02 for _ in range(story.ranks)]
            if story.slow_rank is not None:
                times[story.slow_rank] += 0.12
            held = 11e9 + min(step, 50) * 2e7
            facts = {
                "rank_step_s": [round(seconds, 6) for seconds in times],
                "rank_memory_bytes": [int(held + rank * 1e8) for rank in range(story.ranks)],
                "mfu": (0.36 + dice.random() * 0.02) if story.gpus else None,
            }
        if story.prefers:
            gap = 2.0 - self.loss / 2
            facts |= {"reward_chosen": gap / 2, "reward_rejected": -gap / 2, "reward_margin": gap,
                      "reward_accuracy": 1.0 - self.loss / 6}  # fmt: skip
        seconds = 0.4 + dice.random() * 0.05
        self.tell(
            "step", step, seconds, lr=story.rate * (1 - (step - 1) / story.steps), rows=16,
            cursor=step * 16, tokens=4096, loss=self.loss * (1 + dice.gauss(0, 0.06)),
            grad_norm=abs(dice.gauss(0.6, 0.3)), tokens_per_s=4096 / seconds,
            peak_memory_bytes=11_000_000_000, **facts,
        )  # fmt: skip
        if step in story.save_failed:
            self.tell("save_failed", step, reason="No space left on device")
        if step % 25 == 0:
            gpu = {"utilisation_percent": 90 + dice.randint(-5, 5), "memory_used_bytes": 60 * 10**9,
                   "memory_total_bytes": 80 * 10**9}  # fmt: skip
            self.tell(
                "system", step, cpu_percent=35 + dice.random() * 10, memory_used_bytes=100 * 10**9,
                memory_total_bytes=500 * 10**9,
                **({"gpus": [gpu] * story.gpus} if story.gpus else {}),
            )  # fmt: skip

    def evaluate(self, step: int) -> None:
        accuracy = 0.95 - 0.45 * (self.loss - 0.4) / 3
        self.tell(
            "evaluation", step, 3.0, eval_loss=self.loss * 1.05, eval_accuracy=accuracy,
            eval_seconds=3.0,
        )  # fmt: skip
        if step in (0, self.story.steps):
            for sample in self.story.samples:
                said = sample["before"] if step == 0 else sample["after"]
                facts = {key: sample[key] for key in ("row", "prompt", "expected")}
                self.tell("sample", step, predicted=said, **facts)


def tell(story: Story) -> list[dict[str, Any]]:
    """Return the ledger of a story."""
    writer = _Writer(story)
    writer.start(0)
    writer.evaluate(0)
    step = 0
    while step < story.steps:
        step += 1
        writer.step(step)
        if step % story.evaluate_every == 0 or step == story.steps:
            writer.evaluate(step)
        if step in story.interrupted_at:
            writer.tell("checkpoint", step, 0.2, stall_s=0.2)
            writer.tell("end", step, 0.1, outcome="interrupted")
            writer.now += 30.0
            writer.start(step)
        elif step in story.cut_off_at and writer.attempt < 100:
            story.cut_off_at = tuple(s for s in story.cut_off_at if s != step)
            writer.now += 60.0
            step -= 10
            writer.start(step)
    if story.finished:
        writer.tell("end", story.steps, 0.5, outcome="done")
    return story.records


def write_run(path: Path, story: Story) -> Path:
    """Write the run directory of a story."""
    path.mkdir(parents=True)
    records = tell(story)
    facts = {"rank": story.rank, "steps": story.steps, "rate": story.rate}
    (path / "recipe.yaml").write_text(RECIPE.format(**facts), encoding="utf-8")
    made = {
        "created": "2027-01-15T08:00:00+00:00", "command": ["accelerate", "launch"],
        "python": "3.11.9", "versions": {"torch": "2.13.0"},
        "git": {"revision": "0123456789abcdef", "modified": False},
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(made), encoding="utf-8")
    with (path / "ledger.jsonl").open("w", encoding="utf-8") as ledger:
        ledger.writelines(json.dumps(record) + "\n" for record in records)
    if story.finished:
        (path / "result.json").write_text(json.dumps(_result(story)), encoding="utf-8")
    return path


def _result(story: Story) -> dict[str, Any]:
    peaks = [12_000_000_000 + rank * 100_000_000 for rank in range(story.ranks)]
    return {
        "method": "lora", "world_size": story.ranks, "strategy": "fsdp", "quantization": "nf4",
        "device": "cuda" if story.gpus else "cpu", "base_bytes_total": 4_500_000_000,
        "base_bytes_per_rank": [4_500_000_000 // story.ranks] * story.ranks,
        "trainable_parameters": 2_621_440 * story.rank, "peak_rss_bytes_per_rank": peaks,
        "peak_device_bytes_per_rank": peaks if story.gpus else [0] * story.ranks,
        "steps": story.steps, "tokens_per_second": 9500.0, "final_loss": 0.45,
    }  # fmt: skip
