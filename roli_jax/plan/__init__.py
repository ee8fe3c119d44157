"""What a run will do and cost, from shapes alone."""
