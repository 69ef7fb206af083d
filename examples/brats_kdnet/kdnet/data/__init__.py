"""From files on disk to batches: descriptions, layouts, checks, preprocessing, loading, splits."""
