"""Options, their presets, and how they are read and checked."""
