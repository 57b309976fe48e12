"""Which words is everything else written in? The vocabulary; it imports nothing else of ours."""
