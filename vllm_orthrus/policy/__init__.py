"""What drafting decides by: pure functions, without an engine."""
