"""Checks of the model: speed, attention, memory."""

import math
import re
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from thriftlab.launch.gpu.setting import Finding, Setting, Skipped
from thriftlab.launch.gpu.trace import traced
from thriftlab.launch.messages import no_memory
from thriftlab.launch.probe import configured, loss_of, opened, stepper
from thriftlab.launch.timing import peak_allocation, timer
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


# Of llama-1b, bf16 autocast, AdamW, fp32 weights; counted on tensors without content, see docs/gpu.md.
STATIC, PER_TOKEN, LENGTH = 24e9, 2_019e3, 2048


def memory(setting: Setting) -> Iterator[Finding]:
    """1B in as many rows of 2,048 tokens as the plan says: the peak, and how the size that cannot fit ends."""
    total = torch.cuda.get_device_properties(setting.device).total_memory if setting.on_gpu else 0
    rows = min(12, int((0.92 * total - STATIC) / (PER_TOKEN * LENGTH))) if setting.on_gpu else 2
    if rows < 1:
        raise Skipped(f"llama-1b needs {(STATIC + PER_TOKEN * LENGTH) / 1e9:.0f} GB, and there are {total / 1e9:.0f}")
    length, sizes = setting.size(LENGTH, 16), setting.model({"preset": "llama-1b"})
    with opened(configured(*common(setting, rows, length, model=sizes))) as run:
        step = stepper(run)
        loss = loss_of(run, step())
        held = peak_allocation(step, setting.device)
        peak = torch.cuda.max_memory_allocated() if setting.on_gpu else held
    planned = STATIC + PER_TOKEN * LENGTH * rows
    numbers: dict[str, Any] = {"rows": rows, "loss": loss, "peak_bytes": peak, "planned_bytes": planned}
    says = f"{rows} x {length}: peak {peak / 1e9:.1f} GB, planned {planned / 1e9:.1f} GB"
    wrong = [] if math.isfinite(loss) else [f"loss {loss}"]
    if not setting.on_gpu:
        yield Finding(f"{says}; nothing is made too large on a CPU", numbers, wrong)
        return
    if not 0.9 < peak / planned < 1.1:
        wrong.append(f"the peak is {peak / planned:.2f} of what is planned")
    yield Finding(says, numbers, wrong)
    torch.cuda.empty_cache()
    beyond = int(total / (PER_TOKEN * LENGTH)) + 2
    said = too_large(common(setting, beyond, length, model=sizes))
    numbers |= {"rows_beyond": beyond, "said": said}
    if said is None:
        wrong.append(f"{beyond} rows ended in no message that says what to do")
    yield Finding(f"{says}; {beyond} rows: {said}", numbers, wrong)


def too_large(given: list[dict[str, Any]]) -> str | None:
    """What the command line would say of a step that does not fit; None where it would show a trace."""
    try:
        with opened(configured(*given)) as run:
            stepper(run)()
    except RuntimeError as error:
        return no_memory(error)
    return "it fits"
