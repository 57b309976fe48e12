"""Tools for tests of distributed code: processes in a group, and links of given speed, delay and loss between them."""
