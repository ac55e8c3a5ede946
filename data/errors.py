"""What a user did wrong, or can mend: one message, no traceback."""


class UserError(Exception):
    """The message says what was wrong, where, and what to do; the command line prints it and exits with `code`."""

    code = 2


class ConfigError(UserError):
    """A key, a value or a file of the configuration."""


class DataError(UserError, ValueError):
    """What is wrong with the data, which file, and what to do."""


class EngineError(DataError):
    """Not the data but what does the work: a worker that is killed again and again. What is finished stays."""


class BackendError(UserError):
    """A backend that cannot run here; says why and what can."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, read or applied; the message says which, why, and what to do."""
