"""InfographicVQA (arXiv 2104.12756): 2801 questions about infographics (validation split).

The pictures are very large: bound their tokens with the model's ``max_pixels``.
"""

from ._document import document_benchmark

BENCHMARK = document_benchmark("infovqa", "InfoVQA", subset="InfographicVQA", n_rows=2801)
