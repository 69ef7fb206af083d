"""Write a student's stand-alone folder: python -m privdistill.integrations.nnunet TRAINED [OUT]."""

import sys
from pathlib import Path

from privdistill.integrations.nnunet import write_student_folder

print(write_student_folder(*map(Path, sys.argv[1:3])))
