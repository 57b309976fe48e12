"""What does a training loop do? One that is made of the public pieces, its evaluation, and how a signal ends it."""
