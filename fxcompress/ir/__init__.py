"""The intermediate representation: the Program, its operations, and what can be read off them."""
