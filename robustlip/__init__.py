"""robustlip: certified and observed robustness of neural networks.

    import robustlip
    model = robustlip.load("digits-mlp-lipschitz")
    data = robustlip.load_data("digits:test")
    certificate = robustlip.certify(model, data.x, data.y, robustlip.InputBall("l2"))

Names are imported when they are first used, so that `import robustlip` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load": "robustlip.models.zoo",
    "capture": "robustlip.graph",
    "certify": "robustlip.certifiers",
    "load_data": "robustlip.data",
    "Certificate": "robustlip.certificates",
    "InputBall": "robustlip.threats",
    "EmbeddingBall": "robustlip.threats",
    "WeightBall": "robustlip.threats",
    "parse_threat": "robustlip.threats",
    "Chain": "robustlip.layers",
    "BadInput": "robustlip.errors",
    "CertificateViolation": "robustlip.errors",
    "RobustlipError": "robustlip.errors",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:  # the names that __getattr__ provides, for static tools
    from robustlip.certificates import Certificate  # noqa: F401
    from robustlip.certifiers import certify  # noqa: F401
    from robustlip.data import load_data  # noqa: F401
    from robustlip.errors import BadInput, CertificateViolation, RobustlipError  # noqa: F401
    from robustlip.graph import capture  # noqa: F401
    from robustlip.layers import Chain  # noqa: F401
    from robustlip.models.zoo import load  # noqa: F401
    from robustlip.threats import EmbeddingBall, InputBall, WeightBall, parse_threat  # noqa: F401


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'robustlip' has no attribute {name!r}")
