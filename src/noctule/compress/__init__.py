"""How does a model become smaller? Methods that shrink it while it trains or afterwards."""
