"""Any module as a graph of known operations: a Chain of layers, with joins where branches of the computation meet.

    from robustlip import capture
    chain = capture(model, example)      # example: two or more samples, (N, …)

Read in this order: `program` (the program recorded by torch.export, as nodes), `tokens` and `attention` (embeddings and self-attention as one node
each), `simplify` and `composites` (fewer nodes with the same values), `final` (a softmax at the end), `operations` (the layer of each node), `lower`
(series of layers and branches), `capturing` (all these steps, and the check that the Chain computes the same outputs).
"""

from robustlip.graph.capturing import capture

__all__ = ["capture"]
