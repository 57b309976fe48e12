"""What does `noctule COMMAND` do? One file a command."""
