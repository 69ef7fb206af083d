"""Thin ties to training loops of others; each file needs its package, and nothing here is imported.

`privdistill.integrations.lightning` needs the extra `lightning`, `privdistill.integrations.monai`
the extra `monai`, `privdistill.integrations.nnunet` the extra `nnunet`.
"""
