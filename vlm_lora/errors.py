"""The failures we expect. The command line prints each as one line; the rest are bugs, with a traceback.

A message says what was found and where, what was expected, and what to do next.
"""


class VlmLoraError(Exception):
    """Base of every expected failure."""


class ConfigError(VlmLoraError):
    """A flag or a YAML key is wrong."""


class DataError(VlmLoraError):
    """An image, a caption or a file of data cannot be used."""


class ModelError(VlmLoraError):
    """The base model cannot be found, read or used."""


class AdapterError(VlmLoraError):
    """The adapter does not fit the base model, or some of its keys match nothing."""


class CheckpointError(VlmLoraError):
    """A run folder or a checkpoint is missing, damaged or of another run."""


class TrainingError(VlmLoraError):
    """The numbers went wrong: a loss or a gradient that is not finite."""


class Stopped(VlmLoraError):
    """A run was asked to stop, and has saved. ``exit_code`` is the shell's for the signal: 128 and its number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number
