"""In a checkout the packages lie beside `diffmem`, in an installed copy below it (see setup.py)."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
if (_ROOT / "setup.py").is_file() and (_ROOT / "training").is_dir() and str(_ROOT) not in sys.path:
    sys.path.append(str(_ROOT))
