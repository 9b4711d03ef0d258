"""The builder of variants: recipes, plans and the streaming driver."""
