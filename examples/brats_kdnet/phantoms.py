"""Synthetic subjects as NIfTI files in the layout of BraTS 2021, so that the same reader is used.

    python phantoms.py --out DIR --subjects 40

Nothing learned from phantoms says anything about patients; the file `phantom.json` beside the
subjects makes every result carry the word "phantom".
"""

from collections.abc import Sequence
from pathlib import Path

from kdnet.command import documented, exit_status
from kdnet.data.phantom_files import generate_phantoms


def main(arguments: Sequence[str] | None = None) -> int:
    """Write phantoms from the command line."""
    parser = documented(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to fill")
    parser.add_argument("--subjects", type=int, default=40, help="how many (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument("--size", type=int, default=64, help="voxels per axis (default 64)")
    options = parser.parse_args(arguments)

    def generate() -> None:
        generate_phantoms(
            options.out, subjects=options.subjects, seed=options.seed, size=options.size
        )

    return exit_status(generate)


if __name__ == "__main__":
    raise SystemExit(main())
