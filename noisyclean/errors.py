"""The two ways a command can fail; the command line turns each into one line and an exit code."""


class NoisycleanError(Exception):
    """The work could not be done. Exit code 1. The message names the file and the remedy."""

    exit_code = 1


class UsageError(NoisycleanError):
    """What was asked for makes no sense as asked: a wrong path, key or option. Exit code 2."""

    exit_code = 2
