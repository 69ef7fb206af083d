"""The pages: that of a run, that of a cross-validation, and the parts they are made of."""
