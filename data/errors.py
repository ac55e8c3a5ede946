"""What a user did wrong: one message, no traceback."""


class UserError(Exception):
    """The message says what was wrong, where, and what to do; the command line prints it and exits with code 2."""


class ConfigError(UserError):
    """A key, a value or a file of the configuration."""
