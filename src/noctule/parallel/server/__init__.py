"""How do workers train without waiting? A parameter server with bounded staleness."""
