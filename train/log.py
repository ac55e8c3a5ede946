"""Where the numbers of a run go: metrics.jsonl, a progress bar and the mirrors that were asked for while it trains, and
record.json at its end.

Only the first rank writes. The logged loss is the mean over the whole global batch of that step.
"""

import math
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from thriftlab.kernels import dispatch
from thriftlab.optim import state_bytes
from thriftlab.train import bill
from thriftlab.train.build import Run
from thriftlab.train.config.schema import method_name
from thriftlab.train.late import Numbers
from thriftlab.train.memory import REHEARSAL
from thriftlab.train.records import record
from thriftlab.train.records.progress import Progress
from thriftlab.train.records.record import DataUsed, Memory, ModelUsed, Record, Results, Spent, Throughput, write_record
from thriftlab.train.records.speed import mfu, peak_bytes
from thriftlab.train.records.tracking import tracker
from thriftlab.train.step import StepResult
from thriftlab.train.watch import tell


@dataclass
class Counters:
    """What a run has spent and seen; travels in its checkpoints."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # in training steps; evaluation and saving are not charged
    timed_tokens: int = 0
    timed_seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss: float = float("nan")
    micro_batch_size: int | None = None  # windows of one forward, where the memory of a GPU has decided it

    def add(self, result: StepResult, seconds: float, timed: bool) -> None:
        self.step += 1
        self.tokens += result.tokens
        self.seconds += seconds
        self.timed_tokens += result.tokens * timed
        self.timed_seconds += seconds * timed
        self.skipped += not result.applied
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        self.loss = result.loss

    def tokens_per_second(self) -> float | None:
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else None

    state = asdict


class Log:
    """Numbers of one run, on from `counters`; `history` is the sha256 that metrics.jsonl has up to there."""

    def __init__(self, run: Run, counters: Counters, history: str | None):
        self.run, self.counters, self.warned = run, counters, False
        if not run.chief:
            return
        log, config = run.config.log, run.config.model_dump(mode="json")
        record.write_json(run.out / "config.json", config)
        self.metrics = record.MetricsWriter(run.out / "metrics.jsonl", counters.step, history)
        self.mirrors = tracker(log, run.out, "/".join(run.out.parts[-2:]), config, run.fingerprint[:16])
        total = run.horizon.steps and run.horizon.steps * run.config.train.batch_size * run.config.data.sequence_length
        self.bar = Progress(total, counters.tokens, run.out.name, log.progress)

    def step(self, result: StepResult, lr: float, seconds: float) -> None:
        if not self.run.chief:
            return
        self.bar.update(self.counters.tokens, result.loss)
        values: dict[str, Any] = {}
        if self.counters.step % self.run.config.log.every == 0:
            values = {
                "loss": result.loss,
                "lr": lr,
                "grad_norm": result.grad_norm,
                "tokens_per_second": result.tokens / seconds,
                "skipped": self.counters.skipped,
            }
        if result.weights:
            values["signal"] = tell(result.weights, [source.name for source in self.run.plan.sources])
            self.warn(values["signal"]["ess"])
        if result.applied and result.refresh:
            values["refresh"] = tell_refresh(result.refresh)
        if values:
            self.write(values)

    def warn(self, ess: float) -> None:
        """Once: that weights are far from uniform."""
        if ess < 0.5 and not self.warned:
            self.warned = True
            warnings.warn(
                f"step {self.counters.step}: the weights leave an effective batch of {ess:.0%} of its tokens, so the "
                "gradient is noisier; soften the signal (a higher temperature, w_max), or raise train.batch_size",
                RuntimeWarning,
                stacklevel=2,
            )

    def evaluation(self, found: dict[str, Any]) -> None:
        """One line a step, though a run that was killed just after it evaluates again."""
        last = self.run.chief and self.metrics.last or {}
        if self.run.chief and not (found.keys() <= last.keys() and last["step"] == self.counters.step):
            self.write(found)

    def write(self, values: dict[str, Any]) -> None:
        counters = self.counters
        line = {"step": counters.step, "tokens": counters.tokens, "seconds": counters.seconds, **values}
        self.metrics.write(line)
        self.mirrors.log(line, counters.tokens)

    def close(self) -> None:
        if self.run.chief:
            self.bar.close()
            self.metrics.close()
            self.mirrors.finish()


def over_tensors(diagnostics: dict[str, dict[str, Tensor]]) -> Numbers:
    """How many tensors had something to tell, and of each of their scalars mean and maximum, [2]; on the device."""
    if not diagnostics:
        return {}
    summary = {}
    for key in sorted({key for values in diagnostics.values() for key in values}):
        told = torch.stack([values[key].float() for values in diagnostics.values() if key in values])
        summary[key] = torch.stack([told.mean(), told.max()])
    return {"tensors": torch.full_like(told[0], len(diagnostics)), **summary}


def tell_refresh(summary: Numbers) -> dict[str, Any]:
    """The same for a file."""
    of_each = {
        key: dict(zip(("mean", "max"), tensor.tolist(), strict=True)) for key, tensor in summary.items() if tensor.ndim
    }
    return {"tensors": int(summary["tensors"]), **of_each}


def finish(run: Run, counters: Counters, found: dict[str, Any], origin: dict[str, Any]) -> Record:
    """Write record.json and return what is in it; `found` is the last evaluation, `origin` when and from what code the
    run started."""
    entry = make_record(run, counters, found, origin)
    if run.chief:
        write_record(run.out, entry.to_json())
    return entry


def data_used(run: Run, steps: int) -> DataUsed:
    data, plan = run.dataset, run.plan
    return DataUsed(data.fingerprint, plan.fingerprint, data.tokenizer.name, plan.uses(steps))


def make_record(run: Run, counters: Counters, found: dict[str, Any], origin: dict[str, Any]) -> Record:
    results: dict[str, Any] = found["eval"]
    model, backend, speed = run.model, run.backend, counters.tokens_per_second()
    phases = run.peaks.told()
    expected, found_parts = bill.predicted(run), bill.measured(backend)
    trained = {phase: peak for phase, peak in (phases or {}).items() if phase != REHEARSAL}
    return Record(
        status="done",
        method=method_name(run.config),
        fingerprint=run.fingerprint,
        seed=run.config.seed,
        config=run.config.model_dump(mode="json"),
        **origin,
        world=backend.world,
        data=data_used(run, counters.step),
        model=ModelUsed(
            parameters=sum(p.numel() for p in model.parameters()),
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            flops_per_token=run.flops_per_token,
            layers={"converted": run.conversion.converted, "left": run.conversion.left},
        ),
        budget=Spent(counters.step, counters.tokens, counters.tokens * run.flops_per_token, counters.seconds),
        results=Results(**results, perplexity=math.exp(min(results["loss"], 700)), train_loss=counters.loss),
        memory=Memory(
            parameter_bytes=sum(p.nbytes for p in model.parameters()),
            buffer_bytes=sum(b.nbytes for b in model.buffers()),
            state_bytes=state_bytes(run.optimizer),
            predicted_state_bytes=backend.predicted_state_bytes(),
            peak_bytes=max(trained.values()) if trained else peak_bytes(),
            phases=phases,
            predicted={"parts": expected} if expected else None,
            measured={"parts": found_parts} if found_parts else None,
        ),
        speed=Throughput(
            speed,
            mfu(speed, run.flops_per_token, backend.device, backend.world) if speed else None,
            run.micro_batch_size,
        ),
        skipped_steps=counters.skipped,
        signal=tell(run.objective.report(), [source.name for source in run.plan.sources]),
        remarks=run.optimizer.remarks(),
        finished=time.time(),
        probes=found.get("probes"),
        kernels=dict(dispatch.ran),
    )
