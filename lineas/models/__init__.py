"""Loaded torch models: find modules, take their activations out, put maps in.

This package is the only part of lineas that imports torch.
"""
