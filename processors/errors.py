"""The one error of this package.  A message says what was found, what was expected, and what to do."""


class ProcessorError(ValueError):
    """Messages, images or processor files that cannot be turned into model inputs."""
