"""A package, so that ``tests.tiny`` is ours even where another project installed a top-level ``tests``."""
