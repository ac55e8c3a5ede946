"""What a study says: one sentence an arm, the table, and the warnings that belong to them.

The rule: no interval, no claim. An arm is better or worse than the baseline only where the 95 % t interval of the
paired difference of the final held-out loss leaves out 0.
"""

import json
import statistics
from collections.abc import Sequence

from thriftlab.launch.report.results import Answer, Row, Study, value_at
from thriftlab.launch.report.stats import MANY_SEEDS, Paired, seeds_to_resolve

LR_WORDS = {
    "tuned": "tuned", "default": "not tuned (default lr)", "hand": "lr set by hand", "pending": "being tuned",
    "failed": "every trial failed",
}  # fmt: skip
MUST_AGREE = (  # what all records should have in common -> what a difference means
    (("commit",), "runs come from different commits"),
    (("diff_sha256",), "runs come from different uncommitted changes"),
    (("versions",), "runs come from different library versions"),
    (("machine",), "runs come from different machines or thread counts: tokens/s and seconds are not comparable"),
)


# ---------------------------------------------------------------------------------------------------------- answers


def question(study: Study) -> str:
    if study.plan["question"]:
        return study.plan["question"]
    baseline, *others = study.plan["arms"]
    budget = " and ".join(f"{amount:,.12g} {kind}" for kind, amount in study.plan["budget"].items())
    if not others:
        return f"What does {baseline} reach with {budget} a run?"
    return f"With {budget} a run, which of {', '.join(others)} ends at a lower held-out loss than {baseline}?"


def answers(study: Study) -> list[str]:
    """One sentence for each question that was asked beforehand; else for each arm after the first, the baseline."""
    rows = study.rows
    if study.contrasts:
        return [answer(contrast) for contrast in study.contrasts]
    return [" ".join(filter(None, (verdict(row, rows[0]), cost(row, rows[0]), *remarks(row)))) for row in rows[1:]]


def answer(a: Answer) -> str:
    p = "" if a.adjusted is None else f" Adjusted p (Holm): {a.adjusted:.2g}."
    return f"{a.name[0].upper()}{a.name[1:]}: {claim(a.difference, *a.arms)}{p}"


def verdict(row: Row, baseline: Row) -> str:
    return claim(row.difference, row.arm, baseline.arm)


def claim(d: Paired | None, name: str, baseline: str) -> str:
    """What a paired difference says of two arms."""
    if d is None:
        return f"{name}: no claim, no seed has finished under both it and {baseline}."
    if d.t is None:
        return (
            f"{name}: no claim. On the one seed that both have it ends {nats(d.mean)} nats/token "
            f"{side(d.mean)} {baseline}, and one seed has no interval."
        )
    if d.sd == 0 and d.mean == 0:
        return f"{name} ends at exactly the loss of {baseline} on all {d.n} seeds."
    interval = f"95 % CI {signed(d.t[0])} to {signed(d.t[1])}, {d.n} seeds"
    if d.resolved:
        return f"{name} ends {nats(d.mean)} nats/token {side(d.mean)} {baseline} ({interval})."
    return (
        f"{name}: no claim. Its difference to {baseline} is {signed(d.mean)} nats/token and the interval "
        f"contains 0 ({interval}, half-width {nats(d.t[1] - d.mean)}); {more_seeds(d)}."
    )


def side(difference: float) -> str:
    return "below" if difference < 0 else "above"


def more_seeds(d: Paired) -> str:
    needed = seeds_to_resolve(d.mean, d.sd or 0.0)
    if needed is None:
        return f"even {MANY_SEEDS} seeds would hardly resolve a difference of this size"
    return f"a difference of this size needs about {max(needed, d.n + 1)} seeds"


def cost(row: Row, baseline: Row) -> str:
    """The state that its method keeps, beside the baseline's. Speed is left to the table, which has its spread."""
    if not row.done or not baseline.done:
        return ""
    state = f"Its optimizer state is {mebibytes(row.state_bytes)}"
    if row.state_bytes is None or not baseline.state_bytes:
        return state + "."
    return f"{state}, {100 * row.state_bytes / baseline.state_bytes:.0f} % of {baseline.arm}'s."


def remarks(row: Row) -> list[str]:
    """What its method itself remarked on its runs, as sentences."""
    found = dict.fromkeys(remark for several in row.values("remarks") for remark in several)
    return [f"{remark[0].upper()}{remark[1:]}." for remark in found]


# --------------------------------------------------------------------------------------------------------- warnings


def warnings(study: Study) -> list[str]:
    rows = study.rows
    found = missing(study)
    found += [warning for row in rows for warning in row_warnings(row)]
    for path, meaning in MUST_AGREE:
        if len({json.dumps(value_at(record, *path), sort_keys=True) for record in study.records}) > 1:
            found.append(meaning)
    if any(record.get("diff_sha256") for record in study.records):
        found.append("the code had uncommitted changes; each run's folder holds them as code.diff")
    untuned = [row.arm for row in rows if row.tuning.how == "default"]
    if untuned:
        found.append(f"learning rate not tuned: {', '.join(untuned)}; equal tuning may change the order (--lr-grid)")
    if len({row.tuning.how for row in rows}) > 1:
        found.append("learning rates were chosen in different ways; the comparison is not one of equal effort")
    return found


def missing(study: Study) -> list[str]:
    """The runs that are not there, in one line an arm and reason."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for result in study.results:
        if not result.record:
            seeds.setdefault((result.arm, result.problem), []).append(str(result.seed))
    return [f"{arm} seed{'s' * (len(n) > 1)} {', '.join(n)}: {problem}" for (arm, problem), n in seeds.items()]


def row_warnings(row: Row) -> list[str]:
    found = []
    if row.tuning.edge:
        found.append(
            f"{row.arm}: the best learning rate, {row.tuning.lr:g}, is the {row.tuning.edge} end of the grid; "
            f"a better one may lie beyond"
        )
    lost = [trial for trial in row.tuning.trials if trial.problem]
    found += [f"{row.arm}: trial with lr {trial.lr:g} did not finish: {trial.problem}" for trial in lost]
    if skipped := sum(row.values("skipped_steps")):
        found.append(f"{row.arm}: {skipped:.0f} steps were skipped because loss or gradient was not finite")
    if infinite := len(row.done) - len(row.values("results", "loss")):
        found.append(f"{row.arm}: the final loss of {infinite} runs is not finite; they are left out")
    if row.difference and row.difference.dropped:
        found.append(f"{row.arm}: {row.difference.dropped} runs have no partner with the same seed and are left out")
    found += [f"{row.arm}: {sentence}" for sentence in remarks(row)]
    if set(row.values("memory", "predicted_state_bytes")) != set(row.values("memory", "state_bytes")):
        found.append(f"{row.arm}: measured optimizer state differs from the predicted")
    return found


# ------------------------------------------------------------------------------------------------------------ table


def table(study: Study) -> str:
    """The comparison for a terminal, at most 110 columns wide for names of up to 12 letters."""
    rows = study.rows
    lines = [TABLE_HEAD, *(cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    note = f"±: standard deviation over seeds. Difference to {rows[0].arm}: paired by seed, with 95 % t interval."
    notes = [note, LR_NOTE] if any(lr_mark(row) for row in rows) else [note]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:], *notes])


TABLE_HEAD = ("arm", "loss, nats/token", "bits/byte", "difference, 95 % CI", "state MiB", "tokens/s", "lr", "seeds")
LR_NOTE = "lr: * not tuned (default), h set by hand, e the best of its trials is an edge of the grid, ? none yet"
LR_MARK = {"default": "*", "hand": "h", "tuned": "", "pending": "?", "failed": "?"}


def lr_mark(row: Row) -> str:
    return LR_MARK[row.tuning.how] + ("e" if row.tuning.edge else "")


def cells(row: Row) -> tuple[str, ...]:
    speed = row.mean_sd("speed", "tokens_per_second")[0]
    return (
        row.arm,
        plus_minus(*row.loss),
        number(row.mean_sd("results", "bits_per_byte")[0], ".4f"),
        interval(row.difference),
        "-" if row.state_bytes is None else f"{row.state_bytes / 2**20:.2f}",
        number(speed, ",.0f"),
        number(row.learning_rate, ".3g") + lr_mark(row),
        f"{len(row.done)}/{row.planned}",
    )


def interval(d: Paired | None) -> str:
    if d is None:
        return "-"
    return signed(d.mean) + (f" ({signed(d.t[0])} to {signed(d.t[1])})" if d.t else " (no interval)")


# ---------------------------------------------------------------------------------------------------------- numbers


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def signed(value: float) -> str:
    return f"{value:+.4f}"


def nats(value: float) -> str:
    return f"{abs(value):.4f}"


def plus_minus(mean: float | None, sd: float | None, form: str = ".4f") -> str:
    return number(mean, form) + ("" if sd is None else f" ± {sd:{form}}")


def mebibytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.2f} MiB"


def spread(values: Sequence[float]) -> str:
    """Mean and, over two or more values, the standard deviation in percent of it."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    return f"{mean:,.0f}" + (f" ± {100 * statistics.stdev(values) / mean:.1f} %" if len(values) > 1 else "")
