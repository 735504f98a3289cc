"""The errors of the package: every one a user can cause derives from `VidLaDAError`."""


class VidLaDAError(Exception):
    """Base of all errors raised on purpose; the command line prints them as one line."""

    exit_code = 1


class InputError(VidLaDAError):
    """Invalid input: a file, an option or a configuration value that cannot be used."""

    exit_code = 2
