"""What all trainings of one fold share: subjects, split, networks, device, settings."""
