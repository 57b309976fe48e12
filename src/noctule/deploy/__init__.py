"""How does a model get to where it is used? Files for other runtimes and for our own, and what they cost there, measured."""
