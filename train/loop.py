"""run(config) -> record: build, restore, step, evaluate, save, stop cleanly on a signal.

Everything that happens at a step is a function of (config, step): the batch, the learning rate, every random draw. So
a checkpoint holds the weights, the optimizer's state and a few counters, and a resumed run is bitwise the unbroken one.
Only with a budget in seconds, where progress is a clock and not a step, may it differ.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from thriftlab.data.errors import CheckpointError, UserError
from thriftlab.data.files import sha256, sync, writing
from thriftlab.data.loader import Batch, batches
from thriftlab.data.lock import claimed
from thriftlab.kernels import dispatch
from thriftlab.optim.core.listing import listing
from thriftlab.optim.layers.base import before_step, replaced
from thriftlab.optim.state.keys import keyed_generator, keyed_seed
from thriftlab.train.backends import make_backend
from thriftlab.train.backends.channel import Channel
from thriftlab.train.backends.device import generators
from thriftlab.train.backends.pieces import whole
from thriftlab.train.backends.rendezvous import named_losses, set_timeout
from thriftlab.train.backends.replicas import buffers, take_up_buffers
from thriftlab.train.bill import bill_of
from thriftlab.train.build import Run, build
from thriftlab.train.checkpoints.reader import latest
from thriftlab.train.checkpoints.writer import Writer
from thriftlab.train.config.differences import differences, what_changed
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.dropout import row_keys
from thriftlab.train.evaluate import evaluate
from thriftlab.train.feed import Packed, pack
from thriftlab.train.late import Numbers
from thriftlab.train.log import Counters, Log, finish, over_tensors
from thriftlab.train.memory import REHEARSAL
from thriftlab.train.micro_batch import named_shortage, with_micro_batch
from thriftlab.train.probes.base import PROBES, measured
from thriftlab.train.probes.material import Material
from thriftlab.train.probes.subject import Subject
from thriftlab.train.records.record import Record, provenance, read_record
from thriftlab.train.records.stop import Interrupted, correct_status, status, stop_file_lately, stop_signals
from thriftlab.train.step import REFRESH, take_step
from thriftlab.train.unread import Unread, agree, asks
from thriftlab.train.witness import witness


def run(config: RunConfig) -> dict[str, Any]:
    """Train as configured, or go on where an interrupted run stopped; returns the record, as record.json has it.

    Raises UserError for what the user can mend, and Interrupted after SIGINT, SIGTERM, SIGHUP or a file OUT/STOP.
    """
    set_timeout(config.backend.timeout)
    with named_losses(config.out, config.backend.timeout):
        backend = make_backend(config.backend.name, config.backend.device, **config.backend.options())
    try:
        with stop_signals() as received, named_losses(config.out, config.backend.timeout), named_shortage(config):
            parts = build(config, backend)
            return (finished(parts) or train(parts, received)).to_json()
    finally:
        backend.close()


def train(run: Run, received: list[int]) -> Record:
    """On from the newest checkpoint to the end. `received` holds the numbers of the signals that have come."""
    base_lr = [group["lr"] for group in run.optimizer.param_groups]
    with claim(run):
        examine(run)
        start = restore(run)
        run = with_micro_batch(run, start[0])
        with status(run.out, run.chief):
            return steps(run, base_lr, *start, received)


@contextmanager
def claim(run: Run) -> Iterator[None]:
    """The folder for this run alone: the first rank holds it for all, and no rank goes on where it cannot."""
    with ExitStack() as held:
        refused = None
        try:
            if run.chief:
                held.enter_context(claimed(run.out))
        except UserError as error:
            refused = str(error)
        if refusal := run.backend.share(refused)[0]:
            raise UserError(refusal)
        yield


def steps(run: Run, base_lr: list[float], counters: Counters, history: str | None, received: list[int]) -> Record:
    """The loop. `base_lr` is the learning rate of each group that the schedule multiplies."""
    config, backend, horizon = run.config, run.backend, run.horizon
    origin = {"started": time.time(), **provenance(run.out if run.chief else None)}
    first = step = counters.step  # of steps that were begun; `counters` are of those that were read, see unread.py
    pack_batch = partial(pack, look_up=run.objective.reference)
    batch = batches(run.plan, backend.rank, backend.world, backend.device, pack_batch)
    saver, log, stop_asked = Saver(run), Log(run, counters, history), stop_file_lately(run.out)
    unread = Unread(run, counters, log)
    announce(run, counters)
    run.peaks.enter("step")

    while True:
        asked = bool(received) or run.chief and stop_asked()
        halt, seconds = agree(backend, asked, counters.seconds, unread.asked)
        over, pauses = horizon.over(step, seconds), step > first
        looks = pauses and (due(step, config.eval.every) or due(step, config.probes.every))
        saves = halt or pauses and due(step, config.checkpoint.every)
        if over or looks or saves:
            unread.read_all()
        if over:
            break
        if looks:
            log.evaluation(evaluation(run, step))
        if saves:
            saver.save(counters)
        if halt:
            saver.wait()
            log.close()
            raise Interrupted(run.out, step, received[0] if received else None)

        progress = horizon.progress(step, seconds)
        factor = run.schedule(progress)
        for group, lr in zip(run.optimizer.param_groups, base_lr, strict=True):
            group["lr"] = lr * factor
        seed_step(run, step)
        backend.forget(before_step(run.model, step, config.seed))
        clock = time.perf_counter()
        aim(run, step, progress, asks(backend, asked, counters.seconds))
        unread.add(one_step(run, batch(step)), base_lr[0] * factor, clock)
        step += 1

    found = evaluation(run)
    log.evaluation(found)
    saver.save(counters)  # after the line, which it vouches for
    saver.wait()
    log.close()
    return finish(run, counters, found, origin)


def examine(run: Run) -> None:
    """Holds the ranks against one process, before they train."""
    c = run.config
    if run.backend.world > 1 and c.backend.witness:
        windows = (2, 1, c.data.sequence_length + 1)
        draw = keyed_generator(c.seed, "witness", 0)
        tokens = torch.randint(run.dataset.tokenizer.vocab_size, windows, generator=draw)
        with run.peaks.during(REHEARSAL):
            said = witness(run.backend, tokens, c.train.precision, c.train.clip)
        if run.chief and c.log.progress:
            print(said, file=sys.stderr, flush=True)


def announce(run: Run, counters: Counters) -> None:
    """Says once which layers are replaced, what the method leaves to full AdamW, and which data are repeated."""
    target = run.config.data.proxy_of
    proxy = target and f"a proxy of a run of {target:,} tokens:\n{run.plan.table(run.horizon.steps)}"
    fits = counters.micro_batch_size
    rows = fits and f"micro-batches of {fits} windows, as many as the memory of the GPU holds"
    said = replaced(run.config.layer.name, run.conversion), listing(run.optimizer), run.plan.announcement(), proxy, rows
    lines = [line for line in said if line]
    if lines and run.chief and counters.step == 0:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    if run.chief and (run.backend.device.type != "cpu" or dispatch.choice() != "auto"):
        dispatch.say_aloud()


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def seed_step(run: Run, step: int) -> None:
    """Torch's own generators as a function of (seed, rank, step), for a module that draws from them. Only those that it
    may draw from: torch.manual_seed looks for devices of every kind each time."""
    seed = keyed_seed(run.config.seed, f"rank {run.backend.rank}", step)
    for generator in generators(run.backend.device):
        generator.manual_seed(seed)


def aim(run: Run, step: int, progress: float, asked: tuple[float, ...] = ()) -> None:
    """Tells the objective where the run is, and what is held out if it asks for that now."""
    objective, signal = run.objective, run.objective.signal
    objective.at(step, progress, due(step + 1, run.config.log.every), asked)
    if due(step, signal.validate_every):
        names = [source.name for source in run.plan.sources]
        found = measure(run, signal.validate_tokens, names)["sources"]
        objective.validated(torch.tensor([found[name]["loss"] for name in names], dtype=torch.float64))


def one_step(run: Run, batch: Batch | Packed) -> Numbers:
    """The step that the objective has been told of; its numbers, where the device has them."""
    c, backend = run.config, run.backend
    rows = run.micro_batch_size or c.train.batch_size // backend.world
    keys = None
    if c.train.dropout:
        first = run.objective.step * c.train.batch_size
        keys = row_keys(c.seed, first, c.train.batch_size, backend.rank, backend.world, backend.device)
    numbers = take_step(backend, batch, run.mask_delimiter, rows, c.train.precision, c.train.clip, run.objective, keys)
    found = over_tensors(run.optimizer.diagnostics(fresh=True)) if run.chief else {}
    return numbers | {f"{REFRESH}{key}": tensor for key, tensor in found.items()}


def evaluation(run: Run, step: int | None = None) -> dict[str, Any]:
    """What is to be measured after so many steps; None: at the end."""
    c, found = run.config, {}
    if step is None or due(step, c.eval.every):
        found["eval"] = measure(run)
    if c.probes.every and (step is None or due(step, c.probes.every)):
        subject = Subject(run.backend, run.model, c.train.precision, run.mask_delimiter, c.train.compile)
        material = Material(run.dataset, c.data.sequence_length, run.plan.pool)
        with run.peaks.during("evaluation"):
            found["probes"] = measured(subject, material, c.probes.names or list(PROBES))
    return found


def measure(run: Run, tokens: int | None = None, sources: list[str] | None = None) -> dict[str, Any]:
    """Held-out loss of some sources, or of all; of a pool that is repeated, its loss in training."""
    c, pool = run.config, run.plan.pool
    if sources is not None and pool is not None:
        sources = [name for name in sources if name in run.dataset.sources]
    with run.peaks.during("evaluation"):
        return evaluate(
            run.backend,
            run.dataset,
            c.data.sequence_length,
            c.eval.batch_size,
            c.train.precision,
            run.mask_delimiter,
            tokens or c.eval.tokens,
            sources,
            pool,
        )


class Saver:
    """Checkpoints of one run, written by all ranks together."""

    def __init__(self, run: Run):
        c, self.run = run.config.checkpoint, run
        self.writer = Writer(run.out / "checkpoints", c.keep, c.background, run.backend.channel())
        self.wait = self.writer.wait

    def save(self, counters: Counters) -> None:
        backend = self.run.backend
        kept = {name: whole(tensor) for name, tensor in buffers(self.run.model).items()}
        signal = {name: whole(tensor) for name, tensor in self.run.objective.tensors().items()}
        groups = {"model": backend.weights(), "buffers": kept, "optim": backend.states(), "signal": signal}
        ours = {group: {k: p for k, p in pieces.items() if backend.saves(k)} for group, pieces in groups.items()}
        meta = {
            "fingerprint": self.run.fingerprint,
            "counters": counters.state(),
            "optim": backend.options(),
            "history": history(self.run.out / "metrics.jsonl") if self.run.chief else None,
        }
        with self.run.peaks.during("checkpoint"):
            self.writer.save(counters.step, ours, meta)


def history(metrics: Path) -> str:
    """The sha256 of lines that the disk has: a checkpoint must not outlive the lines that led to it."""
    with writing(metrics):
        sync(metrics)
    return sha256(metrics)


@torch.no_grad()
def restore(run: Run) -> tuple[Counters, str | None]:
    """Take weights and optimizer from the newest whole checkpoint; returns its counters and the sha256 of the metrics
    that led to it. Fresh counters and None where there is no checkpoint."""
    found = latest(run.out / "checkpoints", Channel(run.backend.rank, run.backend.share))
    if found is None:
        return Counters(), None
    if found.meta.get("fingerprint") != run.fingerprint:
        raise UserError(
            f"{run.out} holds a run with another configuration or other data ({what_changed(run.out, run.config)}); "
            f"choose another out=, or remove that folder to start anew"
        )
    try:
        counters = Counters(**found.meta["counters"])
        options, lines = found.meta["optim"], found.meta["history"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {found.path} is not one of a run ({error}); move it away") from error
    run.backend.load(found.reader("model"), found.reader("optim"), options)
    take_up_buffers(run.model, found.reader("buffers"))
    run.objective.load(dict(found.reader("signal")))
    return counters, lines


def finished(run: Run) -> Record | None:
    """The record of this very run, if it is there already."""
    path = run.out / "record.json"
    if not path.exists():
        return None
    entry = Record.from_json(read_record(path))
    if entry.fingerprint != run.fingerprint:
        raise UserError(
            f"{run.out} holds a finished run with another configuration or other data "
            f"({differences(entry.config, run.config)}); choose another out="
        )
    if run.chief:
        correct_status(run.out)
    return entry


def summary(entry: dict[str, Any]) -> str:
    """What `thriftlab train` prints at the end, of what `run` returned."""
    record = Record.from_json(entry)
    results, spent, speed = record.results, record.budget, record.speed.tokens_per_second
    rate = f" ({speed:,.0f} tokens/s)" if speed else ""
    return (
        f"held-out loss {decimals(results.loss)} nats/token, {decimals(results.bits_per_byte)} bits/byte\n"
        f"{spent.steps:,} steps, {spent.tokens:,} tokens, {spent.seconds:.1f} s{rate}; "
        f"optimizer state {record.memory.state_bytes:,} bytes\n"
        f"{bill_of(record)}"
        f"record: {record.config['out']}/record.json"
    )


def decimals(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "not finite"
