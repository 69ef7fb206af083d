import re
from pathlib import Path

APPLICATION = Path(__file__).parents[2] / "examples" / "brats_kdnet"


def test_the_page_changes_lines_that_the_files_have():
    (diff,) = re.findall(r"```diff\n(.*?)```", (APPLICATION / "README.md").read_text(), re.DOTALL)
    changes = re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff, re.DOTALL | re.MULTILINE)
    assert len(changes) == 2
    for file, hunks in changes:
        for hunk in hunks.split("@@\n"):
            old = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] != "+")
            assert old in (APPLICATION / file).read_text()
