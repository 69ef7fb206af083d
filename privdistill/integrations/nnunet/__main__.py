"""Write the stand-alone folder of a student: python -m privdistill.integrations.nnunet TRAINED."""

from privdistill.integrations.nnunet.export import main

main()
