"""ONNX files as modules: the file as data, and a torch program that computes what its graph says, one sample apart from the others.

Read in this order: `wire` (what a file may hold, counted before anything is made of it), `files` (nodes and constants of a file), `builder` (values
of a graph and the torch operations that compute them), `operations` (one function an ONNX operation), `network` (the module).
"""

from robustlip.onnx.network import Network, read_onnx

__all__ = ["Network", "read_onnx"]
