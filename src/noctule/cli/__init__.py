"""What does a command do? One file a command."""
