"""DocVQA (arXiv 2007.00398): 5349 questions about scanned pages of industry documents (validation split)."""

from ._document import document_benchmark

BENCHMARK = document_benchmark("docvqa", "DocVQA", subset="DocVQA", n_rows=5349)
