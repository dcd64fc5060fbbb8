"""Small utilities that know nothing of torch: dictionaries, files, downloads, command lines."""

from dnnlib.util import EasyDict

__all__ = ["EasyDict"]
