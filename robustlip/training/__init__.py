"""Training from a recipe, resumable at any step: AdamW or Muon, a constraint attached to the optimiser, a model file and a card at the end.

The batch of step t is drawn with a generator seeded with (seed, t), and nothing else is random, so a resumed run takes the same steps.
"""

from robustlip.training.loop import train
from robustlip.training.recipe import Recipe, identity, load_recipe
from robustlip.training.state import TrainingStopped

__all__ = ["Recipe", "TrainingStopped", "identity", "load_recipe", "train"]
