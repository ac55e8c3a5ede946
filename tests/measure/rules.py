"""How fast the rules clean text: MB for each second of CPU time of one core, by family and all together.

    OMP_NUM_THREADS=1 python -m tests.measure.rules [INPUT ...] [--rounds 3]

INPUT: files, folders or corpora as in inputs.NAME.path; embedded and synthetic text unless given. "measured": every
rule of the family is computed for every document. "decided": a document is done with at the first rule that fails, as
in a preparation; then the share of documents that are dropped. The best of the rounds.
"""

import argparse
import time

from thriftlab.data.corpora.readers import normalise, read
from thriftlab.data.prepare.rules import chosen, families

CORPORA = ["embedded", "synthetic:documents=300,words=600"]
ALL = ["refinedweb", "c4-no-punctuation", "gopher", "fineweb"]


def seconds(work, texts, rounds):
    spent = []
    for _ in range(rounds):
        started = time.process_time()
        for text in texts:
            work(text)
        spent.append(time.process_time() - started)
    return min(spent)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", default=CORPORA)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    texts = [normalise(document.text) for path in options.inputs for document in read(path)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents, {megabytes:.1f} MB of {', '.join(options.inputs)}")
    print(f"{'':20}{'measured MB/s':>15}{'decided MB/s':>15}{'dropped':>10}")
    for name, chosen_names in {**{family: [family] for family in families()}, "all": ALL}.items():
        rules = chosen(chosen_names)
        measured = megabytes / seconds(rules.explain, texts, options.rounds)
        decided = megabytes / seconds(rules.clean, texts, options.rounds)
        dropped = sum(rules.clean(text).reason is not None for text in texts) / len(texts)
        print(f"{name:20}{measured:15.1f}{decided:15.1f}{dropped:10.1%}")


if __name__ == "__main__":
    main()
