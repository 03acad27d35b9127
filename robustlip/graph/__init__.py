"""Any module as a graph of known operations: a Chain of layers, with joins of branches where the computation parts and meets again.

    from robustlip import capture
    chain = capture(model, example)      # example: two or more samples, (N, …)

Read in this order: `program` (what torch.export recorded, as plain nodes), `tokens` and `attention` (embeddings and self-attention as one node each),
`simplify` and `composites` (fewer nodes, the same values), `final` (a softmax at the end), `operations` (which layer computes a node), `lower` (nodes
in series and branches), `capturing` (all of it, and the proof that the chain is the same program).
"""

from robustlip.graph.capturing import capture

__all__ = ["capture"]
