"""What the configurations take from the reference application beside this bundle."""

import sys
from pathlib import Path

_APPLICATION = Path(__file__).parents[2] / "brats_kdnet"
if not (_APPLICATION / "phantoms.py").is_file():
    raise ImportError(
        f"This bundle takes its networks and phantoms from {_APPLICATION}, which is not there. "
        "Leave it beside brats_kdnet, as in a checkout of privdistill."
    )
if str(_APPLICATION) not in sys.path:
    sys.path.append(str(_APPLICATION))
