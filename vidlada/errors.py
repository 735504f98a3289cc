"""The errors of the package: every one a user can cause derives from `VidLaDAError`."""


class VidLaDAError(Exception):
    """Something went wrong that a message explains; the command line prints it as one line."""

    exit_code = 1


class InputError(VidLaDAError):
    """What the user gave cannot be used: a file, an option, a configuration value."""

    exit_code = 2
