"""thriftlab prepare | train | compare | study | reference | submit | launch | report | bench.

One surprise: nothing heavy is imported here but inside a command, so that `thriftlab --help` is quick.
"""

import difflib
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

USAGE = {
    "prepare": """thriftlab prepare [--config FILE] [key=value ...]
    Text to token shards.""",
    "train": """thriftlab train [--config FILE] [key=value ...]
    One run. The same command again resumes it.""",
    "compare": """thriftlab compare METHOD ... [--budget tokens=1e7] [--seeds 3] [--lr-grid 3e-4,1e-3] [key=value ...]
    Many runs under one budget, paired by seed with those of the first method, and a report.
    METHOD is an update rule, a layer, a signal, or several, as in lost+frugal or frugal+linupper.""",
    "study": """thriftlab study [NAME | FILE.yaml] [--seeds N] [--jobs N] [--out FOLDER] [key=value ...]
    An experiment that is written down: arms, questions, tuning. Without a name: which there are.""",
    "submit": """thriftlab submit [--nodes 2] [--gpus 8] [--time 4:00:00] [--dry-run] [key=value ...]
thriftlab submit compare METHOD ... [--gpus 1] [key=value ...]
thriftlab submit study NAME [--gpus 1] [key=value ...]
    A run as a SLURM job; a study as an array of jobs. The same command again submits what is left.""",
    "reference": """thriftlab reference run=FOLDER [data=FOLDER] [out=FOLDER]
    The losses of a finished run's model on all training windows, for signals that compare with it.""",
    "launch": """thriftlab launch --hostfile FILE [--restarts 3] [--dry-run] [key=value ...]
    A run on several machines over ssh, without SLURM. The same command again resumes it.""",
    "report": """thriftlab report FOLDER [TARGET]
    Writes FOLDER/report.html and FOLDER/report.md of a study anew; or, to be kept without the runs,
    TARGET/report.md with its figures, the plan and a line for every run.""",
    "bench": """thriftlab bench optim [--methods NAME,NAME] [--rounds 7] [--preset llama-60m] [--out FILE.json]
    What a step of each method costs in CPU seconds and bytes, beside torch's own optimizer.""",
}
SYNTAX = """
key=value, --key=value and --key value are the same; values are text, numbers, true, null or [a, b].
--config FILE reads keys from a .yaml, .toml or .json file, any number of times. Later files win
over earlier ones, the command line over all. --plugin FILE.py runs a Python file first, which may
register methods, signals and schedules. Below: key=default, what it means (what it takes).
"""
COMPARE = """
All keys of `thriftlab train --help` but out, seed and optim.name set what the runs have in common.
optim.KEY is meant for every method, layer.KEY and signal.KEY for every one with a layer or a
signal, and METHOD.KEY for one, as in frugal.gap=50; METHOD.layer.KEY and METHOD.optim.KEY tell two
keys of one name apart.
--budget tokens=1e7 is short for the section `budget` with tokens alone.
"""

WITH_PLACE = warnings.formatwarning


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 2 for what the user can mend, 128 + n after signal n."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    wants_help = not {"-h", "--help"}.isdisjoint([command, *rest])
    warnings.formatwarning = one_line
    try:
        if command in ("-h", "--help"):
            print("thriftlab: which pretraining method pays, under your budget?\n")
            print("\n\n".join(USAGE.values()), "\n\nthriftlab COMMAND --help lists the keys of a command.")
        elif command == "settle":
            settle(rest)
        elif command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, 1) or COMMANDS
            return fail(f"unknown command {command!r}; did you mean {' or '.join(near)}?")
        elif wants_help:
            print(USAGE[command])
            HELP[command]([word for word in rest if word not in ("-h", "--help")])
        else:
            COMMANDS[command](rest)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and readers_left():
            return 128 + signal.SIGPIPE
        if not is_message(error):
            tell_torchrun(f"{type(error).__name__}: {error} (its traceback is above)")
            raise
        tell_torchrun(str(error))
        return fail(str(error), getattr(error, "code", 2))
    return 0


def one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A RuntimeWarning is for the user, and says all; others are for programmers, who look for the place."""
    return (
        f"warning: {message}\n" if category is RuntimeWarning else WITH_PLACE(message, category, filename, lineno, line)
    )


def readers_left() -> bool:
    """Whether nobody reads what is printed any more, as after `| head`; if so nothing is printed from now on."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    gone = [stream for stream, event in poll.poll(0) if event & select.POLLERR]
    for stream in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    return bool(gone)


def fail(message: str, code: int = 2) -> int:
    mark = "error: " if 0 < code <= 128 else ""  # being stopped is no mistake
    print("\n".join(f"{mark}{line}" for line in message.splitlines()), file=sys.stderr)
    return code


def tell_torchrun(message: str) -> None:
    """Leave the message where torchrun takes it into its summary, which else says how to enable tracebacks."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def is_message(error: Exception) -> bool:
    """A UserError speaks to the user; any other exception is a defect and keeps its traceback."""
    from thriftlab.data.errors import UserError

    return isinstance(error, UserError)


def prepare(argv: list[str]) -> None:
    from thriftlab.data.prepare import pipeline as prepare
    from thriftlab.train.config import parse as settings

    print(prepare.prepare(settings.load(prepare.PrepareConfig, argv)))


def prepare_help(argv: list[str]) -> None:
    from thriftlab.data.prepare.pipeline import PrepareConfig
    from thriftlab.train.config.help import describe

    print(SYNTAX, describe(PrepareConfig), sep="\n")


def train(argv: list[str]) -> None:
    from thriftlab.train import loop
    from thriftlab.train.config import parse as settings
    from thriftlab.train.config import schema as config

    entry = loop.run(settings.load(config.RunConfig, argv))
    if int(os.environ.get("RANK", 0)) == 0:
        print(loop.summary(entry))


def train_help(argv: list[str]) -> None:
    from thriftlab.train.config import choice
    from thriftlab.train.config import help as surface
    from thriftlab.train.config import parse as settings
    from thriftlab.train.config import schema as config

    settings.validate(choice.Plugins, settings.read(argv).pick(["plugins"]))
    print(SYNTAX, surface.describe(config.RunConfig), sep="\n")


def compare(argv: list[str]) -> None:
    from thriftlab.launch.studies import compare as arguments

    asked = arguments.arguments(argv).request()

    from thriftlab.launch.studies import run as study

    study.run(asked)


def compare_help(argv: list[str]) -> None:
    from thriftlab.launch.studies import compare as arguments
    from thriftlab.train.config import choice
    from thriftlab.train.config import parse as settings

    settings.validate(choice.Plugins, settings.read(argv).pick(["plugins"]))
    print(SYNTAX, COMPARE, arguments.describe(), sep="\n")


def study(argv: list[str]) -> None:
    from thriftlab.launch.studies import written as experiment

    if not argv:
        print(f"The studies:\n{experiment.listing()}")
        return
    asked = experiment.request(argv)

    from thriftlab.launch.studies import run as study

    study.run(asked)


def study_help(argv: list[str]) -> None:
    from thriftlab.launch.studies import written as experiment
    from thriftlab.train.config.help import describe

    print(
        SYNTAX,
        describe(experiment.StudyOptions),
        "\nThe keys of `thriftlab train` change the base of the study.",
        sep="\n",
    )
    print(f"\nThe studies:\n{experiment.listing()}\n\nA file of one's own:\n\n{experiment.example()}")


def reference(argv: list[str]) -> None:
    from thriftlab.train import write_reference as judge
    from thriftlab.train.config import parse as settings

    print(judge.write_reference(settings.load(judge.ReferenceConfig, argv)))


def reference_help(argv: list[str]) -> None:
    from thriftlab.train.config.help import describe
    from thriftlab.train.write_reference import ReferenceConfig

    print(SYNTAX, describe(ReferenceConfig), sep="\n")


def submit(argv: list[str]) -> None:
    from thriftlab.launch.cluster import array, slurm

    options, settings = slurm.read_options(argv)
    many = settings.words[:1] and settings.words[0] in array.REQUESTS
    if settings.words[:1] == ["train"]:
        settings.words.pop(0)
    (array if many else slurm).submit(options, settings)


def submit_help(argv: list[str]) -> None:
    from thriftlab.launch.cluster.slurm import SubmitConfig
    from thriftlab.train.config.help import describe

    print(
        SYNTAX,
        "Besides these, all keys of `thriftlab train`, `thriftlab compare` or `thriftlab study`:\n",
        describe(SubmitConfig),
        sep="\n",
    )


def launch(argv: list[str]) -> None:
    from thriftlab.launch.cluster import hosts

    hosts.launch(argv)


def launch_help(argv: list[str]) -> None:
    from thriftlab.launch.cluster.hosts import LaunchConfig
    from thriftlab.train.config.help import describe

    print(SYNTAX, "Besides these, all keys of `thriftlab train`:\n", describe(LaunchConfig), sep="\n")


def settle(argv: list[str]) -> None:
    """What a task of a study calls before its run; not for people."""
    from thriftlab.launch.cluster import array

    array.settle(*map(Path, argv))


def report(argv: list[str]) -> None:
    from thriftlab.data.errors import ConfigError

    if len(argv) not in (1, 2):
        raise ConfigError("thriftlab report takes the folder of one study: thriftlab report FOLDER [TARGET]")

    from thriftlab.launch.report import page as report
    from thriftlab.launch.report import publish

    folder, *target = map(Path, argv)
    print(publish.publish(folder, target[0]) if target else report.report(folder))


def bench(argv: list[str]) -> None:
    from thriftlab.data.errors import ConfigError

    if argv[:1] != ["optim"]:
        raise ConfigError("thriftlab bench measures one thing so far: thriftlab bench optim")

    from thriftlab.launch import bench
    from thriftlab.train.config import parse as settings

    bench.bench(settings.load(bench.OptimBench, argv[1:]))


def bench_help(argv: list[str]) -> None:
    from thriftlab.launch.bench import OptimBench
    from thriftlab.train.config.help import describe

    print(SYNTAX, describe(OptimBench), sep="\n")


COMMANDS: dict[str, Callable[[list[str]], None]] = dict(
    prepare=prepare,
    train=train,
    compare=compare,
    study=study,
    reference=reference,
    submit=submit,
    launch=launch,
    report=report,
    bench=bench,
)
HELP: dict[str, Callable[[list[str]], None]] = dict(
    prepare=prepare_help,
    train=train_help,
    compare=compare_help,
    study=study_help,
    reference=reference_help,
    submit=submit_help,
    launch=launch_help,
    report=lambda _: None,
    bench=bench_help,
)
