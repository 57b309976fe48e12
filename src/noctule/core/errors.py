"""The errors Noctule raises on purpose, each saying what happened, what was given and what to do."""


class NoctuleError(Exception):
    """The base of every error that Noctule raises on purpose."""


class CheckpointError(NoctuleError):
    """A checkpoint is torn, truncated, foreign, or does not belong to this run."""


class DataError(NoctuleError, ValueError):
    """A data set is missing, corrupt, empty or not what it says it is."""


class ExchangeError(NoctuleError, RuntimeError):
    """Workers do not fit together, or what one of them sent is torn, late or not what it must be."""


class ExportError(NoctuleError, RuntimeError):
    """A model cannot be written for another runtime, or what was written does not compute the same."""


class LostWorkerError(ExchangeError):
    """An exchange was not finished: a worker died or left, or the link between them is down."""


class NonFiniteError(NoctuleError, ArithmeticError):
    """A loss, an input or a weight became NaN or infinite."""


class UsageError(NoctuleError, ValueError):
    """A command was called with a recipe or an option that does not exist or cannot be."""
