"""Published and measured numbers, and the tables that are made from them."""
