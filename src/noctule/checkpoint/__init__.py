"""How does a state survive a kill or a full disk? Training state and models in files without pickle."""

from noctule.checkpoint.folder import Checkpoints
from noctule.checkpoint.model import load_model, save_model
from noctule.checkpoint.state import load, save

__all__ = ["Checkpoints", "load", "load_model", "save", "save_model"]
