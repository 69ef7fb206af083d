"""The two sides of a wrapper: the student, and what can teach it."""
