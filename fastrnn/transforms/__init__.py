"""Layers under torch.func: vmap, grad and the others, nested as one likes."""

from .folds import Fold, Peeled, fold, peel, scan_folded
from .levels import scan

__all__ = ["Fold", "Peeled", "fold", "peel", "scan", "scan_folded"]
