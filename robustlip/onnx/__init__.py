"""Converts ONNX files to modules: reads the file as data, and builds a torch program that computes the graph for each sample separately.

Read in this order: `wire` (counts the contents of a file before it is parsed), `files` (nodes and constants of a file), `builder` (values of a graph
and the torch operations that compute them), `operations` (one function per ONNX operation), `network` (the module).
"""

from robustlip.onnx.network import Network, read_onnx

__all__ = ["Network", "read_onnx"]
