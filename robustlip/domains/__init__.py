"""Abstract domains: one folder for each kind of bound, each a walk over the layers that reads the facts of operations (robustlip.ops)."""
