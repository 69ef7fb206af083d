"""Options with which tests of the application start: the demo, without what helps its student."""

PLAIN = [
    *("--preset", "demo", "--labelled", "null", "--recipe", "options", "--seed", "0"),
    *("--augment", "false", "--temperature", "5", "--memory-format", "contiguous"),
    *("--learning-rate", "0.002"),
]
#: The same with validation subjects and exclusive classes.
QUICK = [*PLAIN, "--validation-fraction", "0.15", "--activation", "softmax"]
