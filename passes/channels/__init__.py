"""Channel dependency: units, layouts, the rules of each operator, and the groups that follow."""
