"""How each row of a table is trained: recipes, their objectives, and the rows themselves."""
