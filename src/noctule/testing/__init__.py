"""Tools for tests of things that talk: processes in a group, and links of given speed, delay and loss between them."""
