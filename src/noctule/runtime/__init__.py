"""How does a shipped model run where there is no torch? With numpy and compiled code alone."""

from noctule.runtime.fields import ModelFileError
from noctule.runtime.model import Model, instruction_set, load

__all__ = ["Model", "ModelFileError", "instruction_set", "load"]
