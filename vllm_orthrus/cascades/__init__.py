"""Speculative cascades: text that follows a mixture of both views, and what a request may ask of them. LOSSY."""
