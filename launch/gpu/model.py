"""Checks of the model: speed, attention, memory."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from thriftlab.data.errors import UserError
from thriftlab.launch.gpu.setting import Finding, Setting
from thriftlab.launch.gpu.trace import traced
from thriftlab.launch.probe import configured, loss_of, opened, stepper
from thriftlab.launch.timing import peak_allocation, timer
from thriftlab.train.build import Run, make_model
from thriftlab.train.micro_batch import free_bytes, kept_bytes, named_shortage, need_of, windows_that_fit
from thriftlab.train.records.speed import mfu

WANTED = 0.5  # MFU
ATTENTION = re.compile(r"flash|fmha|flex|mem_eff|efficient|attention|attn|softmax", re.IGNORECASE)


def common(setting: Setting, rows: int, length: int, **sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a run in bf16 with one micro-batch of so many rows."""
    return [
        {
            "data": {"path": str(setting.text), "sequence_length": length},
            "train": {"batch_size": rows, "micro_batch_size": rows, "precision": "bf16"},
            "backend": {"device": str(setting.device)},
            "out": str(setting.folder / "run"),
        },
        sections,
    ]


def speed(setting: Setting) -> Iterator[Finding]:
    """350M, 16,384 tokens a step: MFU without and with torch.compile, and the kernels of attention."""
    rows, length = setting.size((16, 1024), (2, 16))
    seconds = timer(setting.device)
    numbers: dict[str, Any] = {}
    wrong: list[str] = []
    for mode in ("eager", "compiled"):
        sizes = setting.model({"preset": "llama-350m"})
        given = common(setting, rows, length, model=sizes, train={"compile": mode == "compiled"})
        stance = "force_eager" if setting.small else "default"  # a rehearsal does not wait for a compiler
        with torch.compiler.set_stance(stance), opened(configured(*given)) as run:
            step = stepper(run)
            for _ in range(setting.size(4, 1)):
                step()
            taken = median(seconds(step) for _ in range(setting.size(10, 1)))
            trace = traced(step, setting.device)
            share = mfu(rows * length / taken, run.flops_per_token, setting.device)
        kernels = sorted({name for name in trace.kernels if ATTENTION.search(name)})
        numbers[mode] = {
            "seconds": taken, "tokens_per_second": rows * length / taken, "mfu": share, "launches": trace.launches,
            "idle": trace.idle, "attention": kernels,
        }  # fmt: skip
        if setting.on_gpu and not any("flash" in name.lower() for name in kernels):
            wrong.append(f"{mode}: no kernel of flash attention ran, but {', '.join(kernels) or 'none of attention'}")
        yield Finding(f"350M, bf16: {'; '.join(map(rate, numbers, numbers.values()))}", numbers, wrong)


def rate(mode: str, row: dict[str, Any]) -> str:
    if row["mfu"] is None:
        return f"{mode} {row['tokens_per_second']:,.0f} tokens/s, MFU not known"
    beside = "at or above" if row["mfu"] >= WANTED else "below"
    return f"{mode} {row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.1%}, {beside} {WANTED:.0%}"


def attention(setting: Setting) -> Iterator[Finding]:
    """With and without a document mask and grouped queries: the kernels, the memory, and the CPU's loss in fp32."""
    rows, length = setting.size((4, 2048), (2, 16))
    sizes = setting.model({"preset": "llama-130m", "layers": 2, "vocab_size": None})
    numbers: dict[str, Any] = {}
    wrong: list[str] = []
    for masked in (False, True):
        for kv_heads in (None, setting.size(4, 2)):
            label = f"{'document mask' if masked else 'causal'}{', grouped' if kv_heads else ''}"
            given = common(setting, rows, length, model={**sizes, "kv_heads": kv_heads}, data={"document_mask": masked})
            with opened(configured(*given)) as run:
                step = stepper(run)
                loss = loss_of(run, step())
                held = peak_allocation(step, setting.device)
                trace = traced(step, setting.device)
            other = {"backend": {"device": "cpu"}, "train": {"precision": "fp32"}}
            with opened(configured(*given, other)) as run:
                right = loss_of(run, stepper(run)())
            kernels = sorted({name for name in trace.kernels if ATTENTION.search(name)})
            numbers[label] = {"kernels": kernels, "transient_bytes": held, "loss": loss, "loss_of_cpu": right}
            if not math.isclose(loss, right, abs_tol=0.02):
                wrong.append(f"{label}: loss {loss:.4f}, on the CPU in fp32 {right:.4f}")
            if setting.on_gpu and not any(re.search("flash|flex", name, re.IGNORECASE) for name in kernels):
                wrong.append(f"{label}: neither flash nor flex attention ran")
            says = "; ".join(f"{name} {row['transient_bytes'] / 1e6:,.0f} MB" for name, row in numbers.items())
            yield Finding(says, numbers, wrong)


MOST = 48  # rows of 2,048 tokens of llama-1b, which need 220 GB in one micro-batch


def memory(setting: Setting) -> Iterator[Finding]:
    """1B in the micro-batch that a run would choose: the peak beside the plan, and how one that is too large ends."""
    most, length = setting.size((MOST, 2048), (4, 16))
    config = configured(*common(setting, most, length, model=setting.model({"preset": "llama-1b"})))
    with opened(config) as run:
        model, _ = make_model(config, run.dataset)
        need = need_of(model, setting.device, most, length, config.train.precision, False, False)
        kept = kept_bytes(run)
        stays = kept + need.fixed + sum(p.nbytes for p in run.model.parameters())
        rows = windows_that_fit(free_bytes(setting.device), kept, need, most) if setting.on_gpu else 2
        numbers: dict[str, Any] = {"rows": rows, "planned_bytes": stays + need.window * rows}
        step = stepper(replace(run, micro_batch_size=rows))
        numbers["loss"] = loss_of(run, step())
        found = torch.cuda.memory_allocated() if setting.on_gpu else stays
        numbers["peak_bytes"] = peak = found + peak_allocation(step, setting.device)
        wrong = [] if math.isfinite(numbers["loss"]) else [f"loss {numbers['loss']}"]
        beside = peak / numbers["planned_bytes"]
        if setting.on_gpu and not 0.9 < beside < 1.1:
            wrong.append(f"the peak is {beside:.2f} of what is planned")
        says = f"{rows} x {length}: peak {peak / 1e9:.1f} GB, planned {numbers['planned_bytes'] / 1e9:.1f} GB"
        yield Finding(says, numbers, wrong)
        numbers["too_large"] = too_large(replace(run, micro_batch_size=most))
        if setting.on_gpu and numbers["too_large"] is None:
            wrong.append(
                f"{most} rows ended in no message, though {(stays + need.window * most) / 1e9:.0f} GB are planned"
            )
        yield Finding(f"{says}; {most} rows: {numbers['too_large'] or 'they fit'}", numbers, wrong)


def too_large(run: Run) -> str | None:
    """What is said of a step that does not fit; None where it fits."""
    try:
        with named_shortage(run.config):
            loss_of(run, stepper(run)())
    except UserError as error:
        return str(error)
    return None
