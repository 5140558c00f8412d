"""Which axes of each parameter make a matrix: read off the model, or said by rules; and a table."""
