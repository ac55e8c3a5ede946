"""What each command of thriftlab calls, its usage and its keys.

Nothing heavy is imported at the top, so that `thriftlab --help` is quick: each command imports what it needs.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thriftlab.launch.messages import SYNTAX

COMPARE = """
All keys of `thriftlab train --help` but out, seed and optim.name set what the runs have in common.
optim.KEY is meant for every method, layer.KEY and signal.KEY for every one with a layer or a
signal, and METHOD.KEY for one, as in frugal.gap=50; METHOD.layer.KEY and METHOD.optim.KEY tell two
keys of one name apart.
--budget tokens=1e7 is short for the section `budget` with tokens alone, and --proxy-of tokens=1e9
for data.proxy_of.
"""
Action = Callable[[list[str]], None]
Keys = Callable[[list[str]], str]


@dataclass(frozen=True)
class Command:
    """What `thriftlab NAME` does with its arguments, and the two parts of its help: usage and keys, if it has any."""

    run: Action
    usage: str
    keys: Keys | None = None
    hidden: bool = False
    alone: bool = False  # whether several ranks of it at once would be a mistake

    def help(self, argv: list[str]) -> str:
        return "\n".join([self.usage, SYNTAX, self.keys(argv)]) if self.keys else self.usage


COMMANDS: dict[str, Command] = {}  # in the order of their declarations below


def command(
    usage: str, keys: Keys | None = None, hidden: bool = False, alone: bool = False
) -> Callable[[Action], Action]:
    """Declare a command: a function of its arguments, whose name is that of the command."""

    def register(run: Action) -> Action:
        COMMANDS[run.__name__] = Command(run, usage, keys, hidden, alone)
        return run

    return register


def keys_of(model: str, introduction: str = "") -> Keys:
    """The keys of a command that are the fields of a model, which is named as "module:class"."""

    def describe_model(argv: list[str]) -> str:
        from thriftlab.train.config.help import describe

        return introduction + describe(pkgutil.resolve_name(model))

    return describe_model


def load_plugins(argv: list[str]) -> None:
    """What plugins register has keys, too."""
    from thriftlab.train.config.choice import Plugins
    from thriftlab.train.config.parse import read, validate

    validate(Plugins, read(argv).pick(["plugins"]))


@command(
    """thriftlab prepare [--config FILE] [key=value ...]
    Text to token shards.""",
    keys_of("thriftlab.data.prepare.pipeline:PrepareConfig"),
)
def prepare(argv: list[str]) -> None:
    from thriftlab.data.prepare.pipeline import PrepareConfig, prepare
    from thriftlab.train.config.parse import load

    config, model = load(PrepareConfig, argv), None
    if config.perplexity.run is not None:
        from thriftlab.train.score_documents import scorer

        model = scorer(Path(config.perplexity.run))
    print(prepare(config, model))


@command(
    """thriftlab data show FOLDER [--document NUMBER|ID] [--text WORDS]
thriftlab data export FOLDER FILE [force=true]
    What became of each prepared document, and why; those that stayed, as a file (.parquet, .jsonl).""",
    keys_of("thriftlab.launch.documents:DataOptions"),
)
def data(argv: list[str]) -> None:
    from thriftlab.launch.documents import show_or_export

    show_or_export(argv)


def train_keys(argv: list[str]) -> str:
    load_plugins(argv)
    return keys_of("thriftlab.train.config.schema:RunConfig")(argv)


@command(
    """thriftlab train [--config FILE] [key=value ...]
    One run. The same command again resumes it.""",
    train_keys,
)
def train(argv: list[str]) -> None:
    from thriftlab.train.backends.environment import read_environment
    from thriftlab.train.config.parse import load
    from thriftlab.train.config.schema import RunConfig
    from thriftlab.train.loop import run, summary

    record = run(load(RunConfig, argv))
    if read_environment().rank == 0:
        print(summary(record))


def compare_keys(argv: list[str]) -> str:
    from thriftlab.launch.studies.compare import describe_keys

    load_plugins(argv)
    return f"{COMPARE}\n{describe_keys()}"


@command(
    """thriftlab compare METHOD ... [--budget tokens=1e7] [--seeds 3] [--lr-grid 3e-4,1e-3] [key=value ...]
    Many runs under one budget, paired by seed with those of the first method, and a report.
    METHOD is an update rule, a layer, a signal, or several, as in lost+frugal or frugal+linupper.""",
    compare_keys,
    alone=True,
)
def compare(argv: list[str]) -> None:
    from thriftlab.launch.studies.compare import make_request
    from thriftlab.train.config.parse import read

    request = make_request(read(argv))

    from thriftlab.launch.studies.run import run_study

    run_study(request)


def study_keys(argv: list[str]) -> str:
    from thriftlab.launch.studies.written import describe_keys

    return describe_keys()


@command(
    """thriftlab study [NAME | FILE.yaml] [--seeds N] [--jobs N] [--mini] [--out FOLDER] [key=value ...]
    An experiment that is written down: arms, questions, tuning. Without a name: lists the studies.""",
    study_keys,
    alone=True,
)
def study(argv: list[str]) -> None:
    from thriftlab.launch.studies.written import listing, make_request
    from thriftlab.train.config.parse import read

    if not argv:
        print(f"The studies:\n{listing()}")
        return
    request = make_request(read(["mini=true" if word == "--mini" else word for word in argv]))

    from thriftlab.launch.studies.run import run_study

    run_study(request)


@command(
    """thriftlab submit [--nodes 2] [--gpus 8] [--time 4:00:00] [--dry-run] [key=value ...]
thriftlab submit compare METHOD ... [--gpus 1] [key=value ...]
thriftlab submit study NAME [--gpus 1] [key=value ...]
thriftlab submit prepare [--nodes 4] [--cpus 32] [--memory 128G] [engine=ray] [key=value ...]
    A run as a SLURM job; a study as an array of jobs; a preparation on one node, or on several with
    engine=ray. The same command again submits what is left.""",
    keys_of(
        "thriftlab.launch.cluster.slurm:SubmitConfig",
        "Besides these, all keys of `thriftlab train`, `compare`, `study` or `prepare`:\n\n",
    ),
    alone=True,
)
def submit(argv: list[str]) -> None:
    from thriftlab.launch.cluster import array, prepare, slurm

    options, settings = slurm.read_options(argv)
    kind = settings.words[0] if settings.words else "train"
    if kind in array.REQUESTS:
        return array.submit(options, settings)
    settings.words = settings.words[kind in ("train", "prepare") :]
    (prepare if kind == "prepare" else slurm).submit(options, settings)


@command(
    """thriftlab reference run=FOLDER [data=FOLDER] [out=FOLDER]
    The losses of a finished run's model on all training windows, for signals that compare with it.""",
    keys_of("thriftlab.train.write_reference:ReferenceConfig"),
    alone=True,
)
def reference(argv: list[str]) -> None:
    from thriftlab.train.config.parse import load
    from thriftlab.train.write_reference import ReferenceConfig, write_reference

    print(write_reference(load(ReferenceConfig, argv)))


@command(
    """thriftlab launch --hostfile FILE [--restarts 3] [--dry-run] [key=value ...]
    A run on several machines over ssh, without SLURM. The same command again resumes it.""",
    keys_of("thriftlab.launch.cluster.hosts:LaunchConfig", "Besides these, all keys of `thriftlab train`:\n\n"),
    alone=True,
)
def launch(argv: list[str]) -> None:
    from thriftlab.launch.cluster.hosts import launch

    launch(argv)


@command(
    """thriftlab report FOLDER [TARGET]
    Writes FOLDER/report.html and FOLDER/report.md of a study again. With TARGET: what can be kept
    without the runs, TARGET/report.md with its figures, the plan and a line for every run."""
)
def report(argv: list[str]) -> None:
    from thriftlab.data.errors import ConfigError
    from thriftlab.data.paths import typed_path

    if len(argv) not in (1, 2):
        raise ConfigError("thriftlab report takes the folder of one study: thriftlab report FOLDER [TARGET]")

    from thriftlab.launch.report.page import write_report
    from thriftlab.launch.report.publish import publish
    from thriftlab.launch.report.results import read_study

    folder, *target = map(typed_path, argv)
    study = read_study(folder)
    print(publish(study, target[0]) if target else write_report(study))


@command(
    """thriftlab curate RUNS ... --budget tokens=1e8,1e9 [key=value ...]
    Which pool or mixture ends lowest for each budget, from finished runs that differ in their data.""",
    keys_of("thriftlab.launch.curate:CurateConfig"),
    alone=True,
)
def curate(argv: list[str]) -> None:
    from thriftlab.launch.curate import curate

    print(curate(argv))


def bench_keys(argv: list[str]) -> str:
    parts = {
        "optim": "thriftlab.launch.bench:OptimBench",
        "step": "thriftlab.launch.bench_step:StepBench",
        "kernels": "thriftlab.launch.bench_kernels:KernelBench",
    }
    keys = [keys_of(model, f"thriftlab bench {name}:\n\n")(argv) for name, model in parts.items()]
    more = "bench step takes all keys of `thriftlab train` and METHOD.KEY too, as `thriftlab compare` does."
    return "\n\n".join([*keys, more])


@command(
    """thriftlab bench optim [--methods NAME,NAME] [--rounds 7] [--preset llama-60m] [--out FILE.json]
thriftlab bench step METHOD ... [--rounds 7] [--out FILE.json] [key=value ...]
    What a step costs in seconds and bytes: of each update rule alone, beside torch's optimizers, or
    with forward and backward. On a GPU its own seconds are counted.
thriftlab bench kernels [--compile-only] [--out FILE.json]
    Whether the Triton kernels compile for four GPUs (none is needed), are right, and how fast
    they are on this machine's.""",
    bench_keys,
    alone=True,
)
def bench(argv: list[str]) -> None:
    from thriftlab.data.errors import ConfigError

    what, *rest = argv or [""]
    if what not in ("optim", "step", "kernels"):
        raise ConfigError("thriftlab bench measures one of three things: thriftlab bench optim, step or kernels")

    from thriftlab.train.config.parse import load, read

    if what == "optim":
        from thriftlab.launch.bench import OptimBench, bench_methods

        bench_methods(load(OptimBench, rest))
    elif what == "kernels":
        from thriftlab.launch.bench_kernels import FLAGS, KernelBench, bench_kernels

        bench_kernels(load(KernelBench, [FLAGS.get(word, word) for word in rest]))
    else:
        from thriftlab.launch.bench_step import bench_steps

        bench_steps(read(rest))


@command(
    """thriftlab check gpu [--out FILE] [--only 1,6] [--device cuda:1]
    Thirteen checks of this package on this machine's GPU, in at most eight minutes, and a table.""",
    keys_of("thriftlab.launch.gpu.check:CheckOptions"),
    alone=True,
)
def check(argv: list[str]) -> None:
    from thriftlab.data.errors import ConfigError

    if argv[:1] != ["gpu"]:
        raise ConfigError("thriftlab check looks at one thing: thriftlab check gpu")

    from thriftlab.launch.gpu.check import CheckOptions, check_gpu
    from thriftlab.train.config.parse import load

    check_gpu(load(CheckOptions, ["small=true" if word == "--small" else word for word in argv[1:]]))


@command(
    """thriftlab settle REQUEST RUN
    What a task of a submitted study calls before its run; not for people.""",
    hidden=True,
)
def settle(argv: list[str]) -> None:
    from thriftlab.launch.cluster.array import settle

    settle(*map(Path, argv))
