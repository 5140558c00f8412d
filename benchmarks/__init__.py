"""One file a question, each runnable alone; results are committed as JSON."""
