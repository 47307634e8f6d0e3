"""The errors a user can cause, and the one line each of them prints."""


class InputError(ValueError):
    """Bad input: a file, column, option or model that cannot be used. The command line prints it and exits with 2.

    The message says what was wanted, what came and what to do, in one line.
    """


class CorruptImageError(InputError):
    """An image whose bytes contradict its header: truncated, too long, wrong pixel count or wrong checksum."""


class MissingExtraError(ImportError):
    """An optional package is needed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'xtalfast[{extra}]'")
