"""Mirrors of metrics.jsonl: Weights & Biases (online, offline) and TensorBoard.

A mirror never stops the training: without an account or a network wandb goes on offline, and one that fails later is
dropped, each with one warning. One surprise: wandb's own step restarts at 0 when an offline run resumes, so everything
is logged against `tokens`.
"""

import os
import warnings
from pathlib import Path
from typing import Any, Protocol

from thriftlab.data.errors import UserError

INIT_SECONDS = "30"  # patience with wandb's server at the start, where WANDB_INIT_TIMEOUT does not say
FINISH_SECONDS = "60"  # and at the end; what was not sent stays in OUT/wandb for `wandb sync`


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
                _warn(f"{type(mirror).__name__} stopped mirroring ({error}); training goes on, see metrics.jsonl")


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
        mirrors.append(TensorBoard(Path(out) / "tensorboard"))
    if enabled and (mode := wandb_mode(log)) != "disabled":
        mirrors += [Wandb(run) for run in start_wandb(mode, log, Path(out), name, config, run_id)]
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
) -> list[Any]:
    """One run, online if it can be, else offline; none if wandb cannot even write a file."""
    import wandb

    if mode == "online" and not _has_key(wandb):
        _warn("wandb has no API key (`wandb login`, or WANDB_API_KEY); the run is logged offline, in OUT/wandb")
        mode = "offline"
    out.mkdir(parents=True, exist_ok=True)
    for attempt in dict.fromkeys([mode, "offline"]):
        try:
            settings = wandb.Settings(
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_SECONDS)),
                finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)),
                console="off",
                silent=attempt == "offline",
            )
            return [
                wandb.init(
                    mode=attempt,
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
            ]
        except Exception as error:  # wandb's own errors, and what its network or disk raise through it
            _warn(f"wandb ({attempt}) failed: {error}; training goes on{' offline' if attempt != 'offline' else ''}")
            wandb.teardown()  # the failed run would hold its id
    return []


def _has_key(wandb: Any) -> bool:
    """Whether wandb will find credentials; without them it would ask at the terminal."""
    from requests.utils import get_netrc_auth  # requests comes with wandb

    settings = wandb.setup().settings
    return bool(settings.api_key or settings.identity_token_file or get_netrc_auth(settings.base_url))
