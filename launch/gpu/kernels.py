"""The check of the Triton kernels."""

from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from thriftlab.launch.gpu.setting import Finding, Setting, Skipped
from thriftlab.launch.kernel_cases import cases, measured
from thriftlab.train.backends.device import why_no_gpu

ROUNDS = 5


def kernels(setting: Setting) -> Iterator[Finding]:
    """Each case by a kernel and by plain torch: whether they give the same, and what each takes. Not through
    torch.compile, which alone takes longer than this check has."""
    if setting.on_gpu and not torch.cuda.is_available():
        raise Skipped(f"{why_no_gpu()}; thriftlab bench kernels --compile-only needs no GPU")
    rows: list[dict[str, Any]] = []
    for case in cases(setting.device, setting.small):
        ways = {way: solve for way, solve in case.ways.items() if way in ("torch", "triton")}
        rows.append(measured(case._replace(ways=ways), setting.device, ROUNDS))
        wrong = [says for row in rows for says in row["wrong"]]
        yield Finding(says(rows), {"cases": rows}, wrong)


def says(rows: list[dict[str, Any]]) -> str:
    gains = [
        (median(row["seconds"]["torch"]) / median(row["seconds"]["triton"]), row["case"])
        for row in rows
        if "triton" in row["seconds"]
    ]
    if not gains:
        return (
            f"{len(rows)} cases by plain torch; no kernel ran: {next(iter(rows[0]['skipped'].values()), 'see wrong')}"
        )
    (least, slow), (most, fast) = min(gains), max(gains)
    return f"{len(gains)} kernels, {least:.2g} ({slow}) to {most:.2g} ({fast}) times as fast as plain torch"
