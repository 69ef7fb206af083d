"""Training of one network, with checkpoints and the settings that make it fast."""
