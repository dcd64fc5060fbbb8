"""Small utilities that know nothing of torch: dictionaries, files, downloads, command lines."""

import os
import sys

from dnnlib.util import EasyDict

__all__ = ["EasyDict"]

# Figures are drawn without a window. What a notebook leaves in the environment of the programs that it starts can be a
# backend that is not installed here, which already ends the import of matplotlib; within the notebook it stays.
if "MPLBACKEND" in os.environ and "matplotlib" not in sys.modules and "IPython" not in sys.modules:
    os.environ["MPLBACKEND"] = "Agg"
