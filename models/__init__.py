"""The models: Lipschitz-constrained architectures, unconstrained baselines, and the zoo."""

from robustlip.models.baselines import BaselineGPT, BaselineMLP, BaselineTransformer
from robustlip.models.build import build
from robustlip.models.classifier import LipschitzTransformer
from robustlip.models.gpt import LipschitzGPT
from robustlip.models.mlp import LipschitzMLP

__all__ = ["BaselineGPT", "BaselineMLP", "BaselineTransformer", "LipschitzGPT", "LipschitzMLP", "LipschitzTransformer", "build"]
