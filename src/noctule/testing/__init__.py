"""How is code that talks over a network tested? Processes that can be killed, and links of given speed, delay and loss."""
