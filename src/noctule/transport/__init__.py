"""How do messages reach another machine safely? Encrypted sockets, tickets and frames; training is unknown here."""
