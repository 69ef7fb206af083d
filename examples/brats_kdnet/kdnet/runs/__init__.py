"""A cross-validation: folds, units that train one row on one fold, their order and results."""
