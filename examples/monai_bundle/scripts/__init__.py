"""What the configurations take from the reference application beside this bundle."""

import sys
from pathlib import Path

_APPLICATION = Path(__file__).parents[2] / "brats_kdnet"
if str(_APPLICATION) not in sys.path:
    sys.path.append(str(_APPLICATION))
