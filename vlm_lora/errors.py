"""The failures we expect. The command line prints each as one line; the rest are bugs, with a traceback.

A message says what was found and where, what was expected, and what to do next.
"""


class VlmLoraError(Exception):
    """An expected failure. Its message says what was found and where, what was expected, and what to do next."""


class ConfigError(VlmLoraError):
    """A setting, a flag or a YAML key is wrong."""


class DataError(VlmLoraError):
    """An image, a caption or a file of data cannot be used."""


class ModelError(VlmLoraError):
    """The base model cannot be found, read or used."""


class AdapterError(VlmLoraError):
    """The adapter is missing or damaged, or does not fit the base model."""


class CheckpointError(VlmLoraError):
    """A run folder or a checkpoint is missing, damaged, in use, or of another run."""


class TrainingError(VlmLoraError):
    """The training cannot continue: a loss or gradient is not finite, or memory is too small."""


class Stopped(VlmLoraError):
    """A run was asked to stop, and saved. ``exit_code`` is 128 plus the signal's number, as in a shell."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number
