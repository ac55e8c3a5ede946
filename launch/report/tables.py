"""What a report shows: its tables as text, and how the study was run.

A cell is a tuple: its value, and after that what is printed smaller.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from thriftlab.data.mixture import REPEATED
from thriftlab.launch.report.results import Row, Study
from thriftlab.launch.report.stats import Paired
from thriftlab.launch.report.words import LR_WORDS, mebibytes, number, plus_minus, signed, spread
from thriftlab.train.config.help import text

Cell = tuple[str, ...]
Table = tuple[Sequence[str], Sequence[Sequence[Cell]]]  # head, rows


def sections(study: Study) -> list[tuple[str, Table, str]]:
    """Title, table and note of every table of the report."""
    side_by_side = f"tokens/s: mean over seeds, with {study.plan['jobs']} runs side by side."
    trials = "Final held-out loss, nats/token, of short runs, under seeds that are none of the study's."
    adjusted = (
        "Questions that were asked before the runs. p: two-sided t test of no difference, adjusted for the number of "
        "questions (Holm); the intervals are not. Differences by seed in the order of the seeds."
    )
    repeats = any(REPEATED in record["results"].get("sources", {}) for record in study.records)
    pool = f" {REPEATED}: training text that is seen again and again, not held out." if repeats else ""
    tables = [
        ("Questions", contrast_table(study), adjusted),
        ("Comparison", main_table(study), f"{NOTES} {side_by_side}"),
        ("Arms", arm_table(study), "What differs from the study's base. Peak memory is that of the whole process."),
        ("Held-out loss by source", source_table(study), f"nats/token, mean ± standard deviation over seeds.{pool}"),
        ("Probes", probe_table(study), PROBE_NOTES),
        ("Learning-rate trials", trial_table(study), trials),
    ]
    return [(name, rows, note) for name, rows, note in tables if rows]


HEAD = (
    "arm", "held-out loss, nats/token", "bits per byte", "difference to {}, nats/token", "optimizer state",
    "tokens/s", "learning rate", "cost of its trials", "seeds",
)  # fmt: skip


def main_table(study: Study) -> Table:
    head = [name.format(study.rows[0].arm) for name in HEAD]
    return head, [[*main_row(row)] for row in study.rows]


def main_row(row: Row) -> Iterator[Cell]:
    yield (row.arm,)
    yield (plus_minus(*row.loss),)
    yield (plus_minus(*row.mean_sd("results", "bits_per_byte")),)
    yield difference(row)
    predicted = max(row.values("memory", "predicted_state_bytes"), default=None)
    yield mebibytes(row.state_bytes), f"predicted {mebibytes(predicted)}"
    yield (spread(row.values("speed", "tokens_per_second")),)
    edge = f", {row.tuning.edge} edge" if row.tuning.edge else ""
    yield number(row.learning_rate, ".3g"), LR_WORDS[row.tuning.how] + edge
    yield trial_cost(row)
    yield f"{len(row.done)} of {row.planned}", f"{sum(row.values('skipped_steps')):.0f} steps skipped"


def difference(row: Row) -> Cell:
    d = row.difference
    if d is None:
        return ("–",)
    if d.t is None or d.bootstrap is None:
        return signed(d.mean), "one seed, no interval"
    return (
        signed(d.mean),
        f"95 % t: {signed(d.t[0])} to {signed(d.t[1])}",
        f"bootstrap: {signed(d.bootstrap[0])} to {signed(d.bootstrap[1])}",
    )


def trial_cost(row: Row) -> Cell:
    trials = row.tuning.trials
    if not trials:
        return ("–",)
    tokens, seconds = sum(trial.tokens for trial in trials), sum(trial.seconds for trial in trials)
    return f"{tokens:,.0f} tokens", f"{seconds:,.0f} s in {len(trials)} trials"


def contrast_table(study: Study) -> Table | None:
    if not study.contrasts:
        return None
    rows = [
        [(c.name,), (f"{c.arms[0]} − {c.arms[1]}",), contrast_cell(c.difference), (number(c.adjusted, ".3g"),),
         (", ".join(f"{d:+.3f}" for d in c.by_seed.values()),)]
        for c in study.contrasts
    ]  # fmt: skip
    return ["question", "arms", "difference, nats/token", "p", "by seed"], rows


def contrast_cell(d: Paired | None) -> Cell:
    if d is None:
        return ("–",)
    return (signed(d.mean), f"95 % t: {signed(d.t[0])} to {signed(d.t[1])}") if d.t else (signed(d.mean), "no interval")


def arm_table(study: Study) -> Table:
    """What each arm is, and how large it is."""
    rows = [[(row.arm,), (as_arguments(study.plan["arms"][row.arm]["tree"]),), *sizes(row)] for row in study.rows]
    return ["arm", "settings", "trained parameters", "FLOPs per token", "optimizer state", "peak memory"], rows


def as_arguments(tree: dict[str, Any], prefix: str = "") -> str:
    """A tree as key=value, in the words of the command line."""
    parts = [
        as_arguments(value, f"{prefix}{key}.") if isinstance(value, dict) else f"{prefix}{key}={text(value)}"
        for key, value in tree.items()
    ]
    return " ".join(part for part in parts if part)


def sizes(row: Row) -> list[Cell]:
    """Trained parameters, FLOPs of a token, optimizer state, most memory of any run."""
    trained, flops, state, peak = (
        max(row.values(*path), default=None)
        for path in (("model", "trained"), ("model", "flops_per_token"), ("memory", "state_bytes"),
                     ("memory", "peak_bytes"))
    )  # fmt: skip
    return [(number(trained, ","),), (number(flops, ","),), (mebibytes(state),), (mebibytes(peak),)]


def source_table(study: Study) -> Table | None:
    """Loss by source; None where the text has one source only."""
    names = sorted({name for record in study.records for name in record["results"].get("sources", {})})
    if len(names) < 2:
        return None

    def cell(row: Row, name: str) -> Cell:
        bits = row.mean_sd("results", "sources", name, "bits_per_byte")[0]
        return plus_minus(*row.mean_sd("results", "sources", name, "loss")), f"{number(bits, '.4f')} bits/byte"

    return ["arm", *names], [[(row.arm,), *(cell(row, name) for name in names)] for row in study.rows]


PROBED = {  # title of a column -> where it is among what probes found
    "copy loss": ("copy_loss", "held_out"), "copy loss, random": ("copy_loss", "random"),
    "copy ratio": ("copy_ratio", "held_out"), "copy ratio, random": ("copy_ratio", "random"),
    "second occurrence": ("second_occurrence_loss", "held_out"),
    "second occurrence, random": ("second_occurrence_loss", "random"),
    "prefix matching, mean": ("prefix_matching", "mean"), "prefix matching, best head": ("prefix_matching", "max"),
    "previous token, best head": ("previous_token", "max"), "in-context score": ("in_context",),
    "pool loss": ("pool_loss",), "memorised": ("memorised",),
}  # fmt: skip
PROBE_NOTES = (
    "At the end of the runs, mean ± standard deviation over seeds; docs/probes.md defines them. Losses and the "
    "in-context score in nats per token, the others are shares. random: on random tokens, else on held-out text."
)


def probe_table(study: Study) -> Table | None:
    """What probes found at the end; None where no run was asked."""
    shown = {title: path for title, path in PROBED.items() if any(row.values("probes", *path) for row in study.rows)}
    if not shown:
        return None
    rows = [[(row.arm,), *((plus_minus(*row.mean_sd("probes", *p)),) for p in shown.values())] for row in study.rows]
    return ["arm", *shown], rows


def trial_table(study: Study) -> Table | None:
    grid = sorted({trial.lr for row in study.rows for trial in row.tuning.trials})
    if not grid:
        return None
    losses = {row.arm: {trial.lr: trial.loss for trial in row.tuning.trials} for row in study.rows}
    rows = [[(arm,), *((number(found.get(lr), ".4f"),) for lr in grid)] for arm, found in losses.items()]
    return ["arm", *(f"lr {lr:g}" for lr in grid)], rows


# ------------------------------------------------------------------------------------------------------ how it was run


def circumstances(study: Study) -> list[tuple[str, str]]:
    plan, first = study.plan, (study.records or [{}])[0]
    commit, machine, data = first.get("commit"), first.get("machine", {}), first.get("data", {})
    found: dict[str, Any] = {
        "command": plan["command"],
        "budget of a run": ", ".join(f"{amount:,.12g} {kind}" for kind, amount in plan["budget"].items()),
        "seeds": f"{seeds(plan)}: the same data order and initial weights for every arm",
        "side by side": f"{plan['jobs']} runs at a time, threads each: {plan['threads'] or 'as torch chooses'}",
        "base": as_arguments(plan["base"]) if plan["question"] else "",
        "data": data and f"tokenizer {data.get('tokenizer')}, fingerprint {data['fingerprint']}",
        "code": commit and commit + (", with uncommitted changes" if first["diff_sha256"] else ""),
        "machine": ", ".join(
            [f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}", *machine["gpus"]] if machine else []
        ),
        "versions": ", ".join(f"{name} {version}" for name, version in first.get("versions", {}).items() if version),
        "when": period(study),
    }
    return [(term, fact) for term, fact in found.items() if fact]


def seeds(plan: dict[str, Any]) -> str:
    """0, 1, 2 for most arms, and for how many more seeds which."""
    fewest = min(arm["seeds"] for arm in plan["arms"].values())
    more = [f"{name} to {arm['seeds'] - 1}" for name, arm in plan["arms"].items() if arm["seeds"] > fewest]
    return ", ".join(map(str, range(fewest))) + (f" ({', '.join(more)})" if more else "")


def period(study: Study) -> str:
    """From the start of the first finished run to the end of the last."""
    times = [record[key] for record in study.records for key in ("started", "finished")]
    first, last = (datetime.fromtimestamp(pick(times), UTC) for pick in (min, max)) if times else (None, None)
    return f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC" if times else ""


NOTES = (
    "Differences are paired by seed. The t interval decides; the percentile bootstrap stands beside it and is too "
    "narrow for few seeds (with 3 it can cover 75 % at most). The intervals are one per comparison and not "
    "simultaneous: of k of them one or more may miss with a chance of up to k × 5 %. ± is the standard deviation over "
    "seeds. MiB are 2²⁰ bytes."
)
