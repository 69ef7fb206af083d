"""Add a configuration with a quarter of the features to nnU-Net's plans, for trials without a GPU.

python examples/nnunet/small_plans.py "$nnUNet_preprocessed/Dataset900_Phantoms/nnUNetPlans.json"
"""

import copy
import json
import sys
from pathlib import Path


def add_small(file: Path) -> None:
    """Add `3d_small`, which is `3d_fullres` but for the width of the network."""
    plans = json.loads(file.read_text(encoding="utf-8"))
    architecture = copy.deepcopy(plans["configurations"]["3d_fullres"]["architecture"])
    features = architecture["arch_kwargs"]["features_per_stage"]
    architecture["arch_kwargs"]["features_per_stage"] = [count // 4 for count in features]
    small = {"inherits_from": "3d_fullres", "architecture": architecture}
    plans["configurations"]["3d_small"] = small
    file.write_text(json.dumps(plans, indent=4) + "\n", encoding="utf-8")


if __name__ == "__main__":
    add_small(Path(sys.argv[1]))
