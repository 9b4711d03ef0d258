"""Cards, tables and figures from records alone: nothing here needs torch."""
