"""The part of a report that studies of papers have: perplexities that others published, beside those of the runs.

Some published code counts one batch too many when it averages: it prints exp(loss n / (n + 1)) for n batches. So both
readings are given, of their numbers and of ours.
"""

import math

from thriftlab.launch.report.results import Study
from thriftlab.launch.report.tables import Cell, Table
from thriftlab.launch.report.words import number

HEAD = ("arm", "published", "published, corrected", "here", "here, as they count")
NOTE = "Perplexity of held-out text; here: e to the mean loss over seeds."
COUNTED = "They divide the sum of the losses of about {} batches by one more than their number, which is corrected."


def section(study: Study) -> tuple[str, Table, str] | None:
    """Title, table and note; None for a study to which nothing was published."""
    published = study.plan.get("published")
    if not published:
        return None
    batches, printed = published["batches"], published["perplexity"]
    rows = {row.arm: row for row in study.rows}
    losses = {arm: row.loss[0] for arm, row in rows.items()}
    share = batches and batches / (batches + 1)
    table = [line(arm, printed.get(arm), losses.get(arm), share) for arm in {**rows, **printed}]
    notes = [NOTE, *([COUNTED.format(batches)] if batches else []), f"Source: {published['source']}."]
    return "Published", (HEAD, table), " ".join([*notes, *(f"Uncertain: {each}." for each in published["uncertain"])])


def line(arm: str, printed: float | None, loss: float | None, share: float | None) -> list[Cell]:
    """`share`: n / (n + 1), None where batches are averaged rightly, or how is not known."""
    found = [
        printed,
        printed and share and math.exp(math.log(printed) / share),
        None if loss is None else math.exp(loss),
        None if loss is None or not share else math.exp(loss * share),
    ]
    return [(arm,), *((number(value, ".2f"),) for value in found)]
