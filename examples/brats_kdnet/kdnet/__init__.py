"""The reference application: KD-Net on BraTS, from NIfTI files to a table of results."""
