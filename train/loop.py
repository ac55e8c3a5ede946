"""run(config) -> record: build, restore, step, evaluate, save, stop cleanly on a signal.

Everything that happens at a step is a function of (config, step): the batch, the learning rate, every random draw. So a
checkpoint holds the weights, the optimizer's state and a few counters, and a resumed run is bitwise the unbroken one. One
surprise: with a budget in seconds progress is a clock and not a step, and only then a resumed run may differ.
"""

import json
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from thriftlab.data.loader import prefetch
from thriftlab.data.mixture import Plan
from thriftlab.data.shards import Dataset, open_dataset
from thriftlab.optim import predicted_state_bytes, state_bytes
from thriftlab.optim.base import keyed_seed
from thriftlab.train import checkpoint, record
from thriftlab.train.backend import Backend, make_backend
from thriftlab.train.budget import Horizon
from thriftlab.train.config import RunConfig, fingerprint, make_optimizer, make_plan, make_schedule
from thriftlab.train.errors import UserError
from thriftlab.train.evaluate import evaluate
from thriftlab.train.model import GPT
from thriftlab.train.progress import Progress
from thriftlab.train.step import StepResult, train_step
from thriftlab.train.tracking import tracker

WARM_STEPS = 2  # first steps of a process, not timed: allocator, caches, compilation


@dataclass
class Counters:
    """What a run has spent and seen; travels in the checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # in training steps; evaluation and saving are not charged
    timed_tokens: int = 0
    timed_seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    last_loss: float = field(default=float("nan"))

    def add(self, result: StepResult, seconds: float, timed: bool) -> None:
        self.step += 1
        self.tokens += result.tokens
        self.seconds += seconds
        self.timed_tokens += result.tokens * timed
        self.timed_seconds += seconds * timed
        self.skipped += not result.applied
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        self.last_loss = result.loss

    @property
    def tokens_per_second(self) -> float | None:
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else None


class Interrupted(Exception):
    """The run was asked to stop, has saved, and can go on. `code` is what a shell expects: 128 + signal number."""

    def __init__(self, out: Path, step: int, code: int):
        super().__init__(f"stopped after step {step} and saved; the same command resumes ({out})")
        self.code = code


@dataclass
class Run:
    """The parts of one run, built."""

    config: RunConfig
    backend: Backend
    dataset: Dataset
    plan: Plan
    model: GPT
    optimizer: Optimizer
    horizon: Horizon
    fingerprint: str

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def delimiter(self) -> int | None:
        return self.dataset.tokenizer.delimiter if self.config.data.document_mask else None

    @property
    def chief(self) -> bool:
        return self.backend.rank == 0


def run(config: RunConfig) -> dict:
    """Train as configured, or go on where an interrupted run stopped; returns the record.

    Errors: UserError for what the user can mend; Interrupted after SIGINT, SIGTERM or a file OUT/STOP.
    """
    backend = make_backend(config.backend.name)
    try:
        with stop_signals() as stop:
            return train(build(config, backend), stop)
    finally:
        backend.close()


def build(config: RunConfig, backend: Backend) -> Run:
    """Data, model and optimizer of a run, before its first step."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    torch.use_deterministic_algorithms(config.train.deterministic)
    dataset = open_dataset(config.data.path, verify=config.data.verify)
    model_config = config.model.model_copy(
        update={"vocab_size": config.model.vocab_size or dataset.tokenizer.vocab_size}
    )
    if model_config.vocab_size < dataset.tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size = {model_config.vocab_size} is less than the {dataset.tokenizer.vocab_size} tokens of "
            f"{config.data.path}; raise it or leave it out"
        )
    with torch.device("meta"):
        model = GPT(model_config, config.train.activation_checkpointing)
    model.to_empty(device=backend.device)
    model.init_weights(config.seed)
    optimizer = make_optimizer(config, model)
    backend.prepare(model, optimizer, config.train.compile)

    tokens_per_step = config.train.batch_size * config.data.sequence_length
    horizon = config.budget.horizon(tokens_per_step, model.flops_per_token(config.data.sequence_length))
    plan = make_plan(config, dataset, horizon.steps)
    return Run(config, backend, dataset, plan, model, optimizer, horizon, fingerprint(config, dataset.fingerprint))


def train(r: Run, stop: dict) -> dict:
    """The loop."""
    finished = finished_record(r)
    if finished:
        return finished
    config, backend = r.config, r.backend
    started = time.time()
    counters = restore(r)
    schedule = make_schedule(config)
    base_lr = [group["lr"] for group in r.optimizer.param_groups]
    batches = prefetch(r.plan, backend.rank, backend.world)
    micro_batch_size = config.train.micro_batch_size or config.train.batch_size
    saver = checkpoint.Writer(r.out / "checkpoints", config.checkpoint.keep, config.checkpoint.background)
    log = Log(r, counters)
    first = counters.step
    r.backend.module.train()

    while True:
        halt, counters.seconds = agree(backend, bool(stop) or (r.out / "STOP").exists(), counters.seconds)
        if halt:
            save(r, saver, counters)
            saver.wait()
            log.close()
            raise Interrupted(r.out, counters.step, 128 + stop.get("signal", signal.SIGTERM))
        if r.horizon.over(counters.step, counters.seconds):
            break

        factor = schedule(r.horizon.progress(counters.step, counters.seconds))
        for group, lr in zip(r.optimizer.param_groups, base_lr, strict=True):
            group["lr"] = lr * factor
        torch.manual_seed(keyed_seed(config.seed, f"rank {backend.rank}", counters.step))
        clock = time.perf_counter()
        batch = batches(counters.step)
        result = train_step(
            backend, batch, r.delimiter, micro_batch_size, config.train.precision, config.train.clip
        )
        seconds = time.perf_counter() - clock
        counters.add(result, seconds, timed=counters.step - first >= WARM_STEPS)
        log.step(result, base_lr[0] * factor, seconds)
        if counters.skipped_in_a_row >= config.train.max_skipped_steps:
            raise UserError(diverged(counters, base_lr[0]))

        if due(counters.step, config.eval.every) and not r.horizon.over(counters.step, counters.seconds):
            log.evaluation(measure(r))
        if due(counters.step, config.checkpoint.every):
            save(r, saver, counters)

    results = measure(r)
    log.evaluation(results)
    save(r, saver, counters)
    saver.wait()
    log.close()
    return finish(r, counters, results, started)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def agree(backend: Backend, halt: bool, seconds: float) -> tuple[bool, float]:
    """One answer for all ranks: whether somebody was asked to stop, and the first rank's clock."""
    votes = torch.tensor([float(halt), seconds if backend.rank == 0 else 0.0], dtype=torch.float64, device=backend.device)
    halts, clock = backend.sum(votes).tolist()
    return halts > 0, clock


def measure(r: Run) -> dict:
    c = r.config
    return evaluate(
        r.backend,
        r.dataset,
        c.data.sequence_length,
        c.eval.batch_size,
        c.train.precision,
        r.delimiter,
        c.eval.tokens,
    )


def save(r: Run, saver: checkpoint.Writer, counters: Counters) -> None:
    if not r.chief:
        return
    optim, groups = checkpoint.pack_optimizer(r.optimizer)
    tensors = {"model": dict(r.model.named_parameters()), "optim": optim}
    saver.save(counters.step, tensors, {"fingerprint": r.fingerprint, "counters": asdict(counters), "groups": groups})


def restore(r: Run) -> Counters:
    """Weights, optimizer and counters of the newest whole checkpoint; fresh counters if there is none."""
    base = [dict(group) for group in r.optimizer.param_groups]
    found = checkpoint.latest(r.out / "checkpoints")
    if found is None:
        return Counters()
    if found.meta["fingerprint"] != r.fingerprint:
        raise UserError(
            f"{r.out} holds a run with another configuration or other data (see its config.json); "
            f"choose another out=, or remove the folder to start anew"
        )
    with torch.no_grad():
        for name, parameter in r.model.named_parameters():
            parameter.copy_(found.tensors["model"][name])
    checkpoint.unpack_optimizer(r.optimizer, found.tensors["optim"], found.meta["groups"])
    for group, fresh in zip(r.optimizer.param_groups, base, strict=True):
        group["lr"] = fresh["lr"]  # the schedule starts from the configured rate, not from the last scheduled one
    return Counters(**found.meta["counters"])


def finished_record(r: Run) -> dict | None:
    """The record of this very run, if it is there already."""
    path = r.out / "record.json"
    if not path.exists():
        return None
    done = record.read_record(path)
    if done["fingerprint"] != r.fingerprint:
        raise UserError(f"{r.out} holds a finished run with another configuration or other data; choose another out=")
    return done


def finish(r: Run, counters: Counters, results: dict, started: float) -> dict:
    """Write record.json and return it."""
    speed = counters.tokens_per_second
    flops = r.model.flops_per_token(r.config.data.sequence_length)
    entry = {
        "status": "done",
        "method": r.config.optim.name,
        "fingerprint": r.fingerprint,
        "seed": r.config.seed,
        "config": r.config.model_dump(mode="json"),
        **record.birth_certificate(r.out if r.chief else None),
        "data": {"fingerprint": r.dataset.fingerprint, "plan": r.plan.fingerprint, "tokenizer": r.dataset.tokenizer.name},
        "model": {"parameters": sum(p.numel() for p in r.model.parameters()), "flops_per_token": flops},
        "world": r.backend.world,
        "budget": {
            "steps": counters.step,
            "tokens": counters.tokens,
            "flops": counters.tokens * flops,
            "seconds": counters.seconds,
        },
        "results": {**results, "perplexity": perplexity(results["loss"]), "train_loss": counters.last_loss},
        "memory": {
            "parameter_bytes": sum(p.nbytes for p in r.model.parameters()),
            "state_bytes": state_bytes(r.optimizer),
            "predicted_state_bytes": predicted_state_bytes(r.optimizer),
            "peak_bytes": record.peak_bytes(),
        },
        "speed": {
            "tokens_per_second": speed,
            "mfu": record.mfu(speed, flops * 1.0, r.backend.device) if speed else None,
        },
        "skipped_steps": counters.skipped,
        "started": started,
        "finished": time.time(),
    }
    if r.chief:
        record.write_record(r.out, entry)
    return entry


def perplexity(loss: float) -> float:
    return float(torch.tensor(loss, dtype=torch.float64).exp())


def diverged(counters: Counters, lr: float) -> str:
    return (
        f"loss or gradient was not finite in {counters.skipped_in_a_row} steps in a row (up to step {counters.step}); "
        f"nothing was updated in them. Lower optim.lr (now {lr:g}), set train.clip=1.0 or use train.precision=fp32"
    )


class Log:
    """Where numbers go: metrics.jsonl always, the progress bar, and the trackers that were asked for; first rank only."""

    def __init__(self, r: Run, counters: Counters):
        self.r, self.counters, self.every = r, counters, r.config.log.every
        if not r.chief:
            return
        r.out.mkdir(parents=True, exist_ok=True)
        record.write_json(r.out / "config.json", r.config.model_dump(mode="json"))
        self.metrics = record.MetricsWriter(r.out / "metrics.jsonl", counters.step)
        self.tracker = tracker(r.config.log, r.out, r.out.name, r.config.model_dump(mode="json"), r.fingerprint)
        self.bar = Progress(self.total_tokens(), counters.tokens, r.out.name, r.config.log.progress)

    def total_tokens(self) -> int | None:
        c = self.r.config
        return self.r.horizon.steps and self.r.horizon.steps * c.train.batch_size * c.data.sequence_length

    def step(self, result: StepResult, lr: float, seconds: float) -> None:
        if not self.r.chief:
            return
        self.bar.update(self.counters.tokens, result.loss)
        if due(self.counters.step, self.every):
            self.write(
                {
                    "loss": result.loss,
                    "lr": lr,
                    "grad_norm": result.grad_norm,
                    "tokens_per_second": result.tokens / seconds,
                    "skipped": self.counters.skipped,
                }
            )

    def evaluation(self, results: dict) -> None:
        if self.r.chief:
            self.write({"eval": results})

    def write(self, values: dict[str, Any]) -> None:
        c = self.counters
        line = {"step": c.step, "tokens": c.tokens, "seconds": c.seconds, **values}
        self.metrics.write(line)
        self.tracker.log(line, c.tokens)

    def close(self) -> None:
        if self.r.chief:
            self.bar.close()
            self.metrics.close()
            self.tracker.finish()


@contextmanager
def stop_signals():
    """A dict that receives {"signal": number} when SIGINT or SIGTERM comes; a second SIGINT stops at once."""
    received: dict[str, int] = {}

    def ask(number, frame):
        if received and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        received.setdefault("signal", number)
        print("\nfinishing the step, then saving; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def summary(entry: dict) -> str:
    """A few lines for the end of `thriftlab train`."""
    results, speed = entry["results"], entry["speed"]["tokens_per_second"]
    rate = f", {speed:,.0f} tokens/s" if speed else ""
    return (
        f"held-out loss {results['loss']:.4f} nats/token, {results['bits_per_byte']:.4f} bits/byte, after "
        f"{entry['budget']['steps']:,} steps and {entry['budget']['tokens']:,} tokens in "
        f"{entry['budget']['seconds']:.1f} s{rate}; optimizer state {entry['memory']['state_bytes']:,} bytes\n"
        f"record: {json.dumps(str(Path(entry['config']['out']) / 'record.json'))}"
    )
