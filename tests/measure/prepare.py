"""What a preparation costs: MB of text per CPU second, by stages, and two processes beside one.

    OMP_NUM_THREADS=1 python -m tests.measure.prepare medium:essays medium:wikipedia [--mb 24]

Texts are domains of the recipe `medium` (from prepared/.downloads), written as one file of jsonl of that many MB. Where
they are repeated, a number stands before every document. Wall times are of one run each: take them on an idle machine.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from thriftlab.data.corpora import recipes
from thriftlab.data.corpora.packages import DOWNLOADS

PLAIN = {"tokenizer": "bpe:4096"}
RULES = {"rules": ["gopher", "c4", "fineweb", "refinedweb"]}
NEAR = {"near": {"bands": "14x8"}}
QUALITY = {"quality": {"positive": ["good"], "negative": ["text"]}, "pools": {"by": "score"}}
SETTINGS = {
    "exact, hold out, decontaminate, tokens": PLAIN,
    "and rules": PLAIN | RULES,
    "and near-duplicates": PLAIN | RULES | NEAR,
    "and classifier, pools": PLAIN | RULES | NEAR | QUALITY,
}
SCRIPT = """
import json, sys
from thriftlab.data.prepare import PrepareConfig, prepare
if __name__ == "__main__":
    prepare(PrepareConfig(**json.loads(sys.argv[1])))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domains", nargs="+")
    parser.add_argument("--mb", type=float, default=24)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        size = write(place / "text.jsonl", given.domains, given.mb * 1e6)
        good = write(place / "good.jsonl", given.domains[:1], min(given.mb * 1e5, 1e6))
        (place / "run.py").write_text(SCRIPT)
        for name, settings in SETTINGS.items():
            with_good = "quality" in settings
            seconds, cpu = run(place, settings, with_good, engine="here")
            total = (size + good * with_good) / 1e6
            print(f"{name:42} {total / cpu:6.2f} MB per CPU second  ({cpu:.1f} s CPU, {seconds:.1f} s)", flush=True)
        walls = {workers: run(place, settings, True, engine="processes", workers=workers)[0] for workers in (1, 2)}
        print(f"processes: 1 {walls[1]:.1f} s, 2 {walls[2]:.1f} s: {walls[1] / walls[2]:.2f} times")


def write(file: Path, domains: list[str], wanted: float) -> int:
    """Documents in turns until there are `wanted` bytes of text; returns the bytes."""
    texts = [text for domain in domains for _, text, _ in recipes.documents(domain, DOWNLOADS)]
    size = 0
    with open(file, "w") as out:
        for number, text in enumerate(itertools.cycle(texts)):
            if size >= wanted:
                return size
            text = text if number < len(texts) else f"{number} {text}"
            out.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
    return size


def run(place: Path, settings: dict, with_good: bool, **how: object) -> tuple[float, float]:
    """Seconds, and CPU seconds of the process and its children."""
    inputs = {"text": {"path": str(place / "text.jsonl"), "kind": "web"}}
    if with_good:
        inputs["good"] = {"path": str(place / "good.jsonl")}
    given = settings | {"out": str(place / "out"), "inputs": inputs, "force": True, "piece_bytes": 2**22} | how
    before, start = cpu_of_children(), time.monotonic()
    subprocess.run([sys.executable, place / "run.py", json.dumps(given)], check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - start, cpu_of_children() - before


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
