"""The bytes that launches of the Triton kernels move, beside their formulas: the table of docs/kernels.md.

    TRITON_INTERPRET=1 python -m tests.measure.kernel_bytes

Counted in triton's interpreter (tests/tools/triton_trace.py), by entry of the tensors: no GPU, and no time.
"""

from tests.tools.kernel_bytes import CASES


def main() -> None:
    print("| launch | formula, B an entry | distinct | asked | programs |\n|---|---|---|---|---|")
    for name, case in CASES.items():
        moved, entries = case.run()
        distinct, asked = moved.distinct / entries, moved.asked / entries
        print(
            f"| {name} | {case.formula:.4g} | {distinct:.2f} ({distinct / case.formula:.2f} x) "
            f"| {asked:.2f} ({asked / case.formula:.2f} x) | {moved.programs} |"
        )


if __name__ == "__main__":
    main()
