"""One module per op: reference, Function, functional, Module, and its row of the table."""
