"""Studies of many trainings: their stored rows, paired gains, tables and figures."""
