"""The vocabulary: what every other part of Noctule is written in; it imports nothing else of ours."""
