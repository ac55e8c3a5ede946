"""Mirrors of metrics.jsonl: Weights & Biases (online, offline) and TensorBoard.

A mirror never stops the training: without an account or a network wandb goes on offline, and one that fails later is
dropped, each with one warning. One surprise: wandb's own step restarts at 0 when an offline run resumes, so everything
is logged against `tokens`.
"""

import functools
import os
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from thriftlab.data.errors import UserError

INIT_SECONDS = "30"  # patience with wandb's server at the start, where WANDB_INIT_TIMEOUT does not say
FINISH_SECONDS = "60"  # and at the end; what was not sent stays in OUT/wandb for `wandb sync`
OF_ONE_RUN = (  # variables that say which run it is, or where it goes on: not for the runs of a study
    "WANDB_RUN_ID", "WANDB_NAME", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM", "WANDB_RUN_DIR",
    "WANDB_RUN_STORAGE_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH",
)  # fmt: skip


class LogSection(Protocol):
    """What the configuration says about mirrors. `wandb`: online, offline or disabled."""

    @property
    def wandb(self) -> Any: ...
    @property
    def tensorboard(self) -> bool: ...
    @property
    def project(self) -> str: ...
    @property
    def group(self) -> str | None: ...


class Mirror(Protocol):
    def log(self, values: dict[str, Any], tokens: int) -> None: ...
    def finish(self) -> None: ...


class Tracker:
    """All mirrors of a run; a mirror that raises is dropped with a warning."""

    def __init__(self, mirrors: list[Mirror]):
        self.mirrors = mirrors

    def log(self, line: dict[str, Any], tokens: int) -> None:
        """Send one line of metrics.jsonl; nested keys become `eval/sources/NAME/loss`."""
        values = flatten(line, "/")
        self._each(lambda mirror: mirror.log(values, tokens))

    def finish(self) -> None:
        self._each(lambda mirror: mirror.finish())
        self.mirrors = []

    def _each(self, action) -> None:
        for mirror in list(self.mirrors):
            try:
                action(mirror)
            except Exception as error:  # whatever it is, it is not worth the run
                self.mirrors.remove(mirror)
                what = f"{type(mirror).__name__} stopped mirroring ({_first_line(error)})"
                _warn(f"{what}; training goes on, see metrics.jsonl")


def tracker(
    log: LogSection, out: Path, name: str, config: dict[str, Any], run_id: str | None = None, enabled: bool = True
) -> Tracker:
    """The mirrors that `log` asks for; none where not `enabled` (every rank but the first).

    The environment's WANDB_MODE, WANDB_PROJECT and WANDB_RUN_ID win over `log`, `run_id` and a run that asks for wandb;
    a run that does not ask for it never imports it. Raises UserError if TensorBoard is asked for and not installed.

    Args:
        config: Becomes flat in wandb (`optim.lr`).
        run_id: Stable name of the run, under which a resumed one continues.
    """
    mirrors: list[Mirror] = []
    if enabled and log.tensorboard:
        mirrors += start_tensorboard(Path(out) / "tensorboard")
    if enabled and (mode := wandb_mode(log)) != "disabled":
        mirrors += start_wandb(mode, log, Path(out), name, config, run_id)
    return Tracker(mirrors)


def flatten(tree: dict[str, Any], separator: str) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a/b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}{separator}{inner}": item for inner, item in flatten(value, separator).items()}
        else:
            flat[key] = value
    return flat


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


# ------------------------------------------------------------------------------------------------------ TensorBoard


def start_tensorboard(folder: Path) -> list[Mirror]:
    """UserError if TensorBoard is not installed; none, with a warning, if it cannot write there."""
    silence_writer()
    try:
        return [TensorBoard(folder)]
    except UserError:
        raise
    except Exception as error:
        _warn(f"TensorBoard does not start: {_first_line(error)}; training goes on without it, see metrics.jsonl")
        return []


@functools.cache
def silence_writer() -> None:
    """No trace of TensorBoard's thread, which writes: what fails in it is raised again by the next call, and told."""
    hook = threading.excepthook

    def passed_on(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            hook(failure)

    threading.excepthook = passed_on


class TensorBoard:
    """Scalars against tokens, in `folder`."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "log.tensorboard=true needs TensorBoard: pip install 'thriftlab[tensorboard]', or leave it false"
            ) from None
        self.writer = SummaryWriter(str(folder))

    def log(self, values: dict[str, Any], tokens: int) -> None:
        for key, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(key, value, tokens)

    def finish(self) -> None:
        self.writer.close()


# ------------------------------------------------------------------------------------------------------------ wandb


class Wandb:
    """A wandb run whose x axis is `tokens`."""

    def __init__(self, run: Any):
        self.run = run
        run.define_metric("tokens")
        run.define_metric("*", step_metric="tokens")

    def log(self, values: dict[str, Any], tokens: int) -> None:
        self.run.log({key: value for key, value in values.items() if value is not None} | {"tokens": tokens})

    def finish(self) -> None:
        self.run.finish()


def wandb_mode(log: LogSection) -> Any:
    """online, offline or disabled."""
    if log.wandb == "disabled":
        return "disabled"
    mode = os.environ.get("WANDB_MODE") or log.wandb
    return {"dryrun": "offline", "run": "online"}.get(mode, mode)


def start_wandb(
    mode: Any, log: LogSection, out: Path, name: str, config: dict[str, Any], run_id: str | None
) -> list[Mirror]:
    """One mirror, online if it can be, else offline; none if wandb cannot even write a file. One warning at most."""
    for variable in [key for key, value in os.environ.items() if key.startswith("WANDB_") and not value]:
        del os.environ[variable]  # empty is unset, which wandb does not take it for
    problem = ""
    try:
        import wandb

        if mode == "online" and not _has_key(wandb):
            problem, mode = "has no API key (`wandb login`, or WANDB_API_KEY)", "offline"
        out.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # also what wandb raises while it is imported
        _warn(f"wandb does not start: {_first_line(error)}; training goes on without it, see metrics.jsonl")
        return []
    for attempt in dict.fromkeys([mode, "offline"]):
        try:
            mirror = Wandb(_init(wandb, attempt, log, out, name, config, run_id))
        except Exception as error:  # wandb's own errors, and what its network or disk raise through it
            problem = f"{problem}, then {attempt}: " if problem else f"({attempt}) failed: "
            problem += _first_line(error)
            with suppress(Exception):
                wandb.teardown()  # the failed run would hold its id
        else:
            if problem:
                _warn(f"wandb {problem}; training goes on, mirrored {attempt} in {out}/wandb")
            return [mirror]
    _warn(f"wandb {problem}; training goes on without it, see metrics.jsonl")
    return []


def _init(
    wandb: Any, mode: str, log: LogSection, out: Path, name: str, config: dict[str, Any], run_id: str | None
) -> Any:
    settings = wandb.Settings(
        init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_SECONDS)),
        finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)),
        console="off",
        silent=mode == "offline",
    )
    return wandb.init(
        mode=mode,
        dir=str(out),
        project=os.environ.get("WANDB_PROJECT", log.project),
        group=log.group,
        name=name,
        id=os.environ.get("WANDB_RUN_ID", run_id),
        resume="allow",
        job_type="train",
        config=flatten(config, "."),
        settings=settings,
    )


def _first_line(error: Exception) -> str:
    """Of its message, after those that pydantic puts before it."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))} = {first['input']!r}: {first['msg']}"
    return " ".join(str(error).split()) or type(error).__name__


def _has_key(wandb: Any) -> bool:
    """Whether wandb will find credentials; without them it would ask at the terminal."""
    from requests.utils import get_netrc_auth  # requests comes with wandb

    settings = wandb.setup().settings
    return bool(settings.api_key or settings.identity_token_file or get_netrc_auth(settings.base_url))
