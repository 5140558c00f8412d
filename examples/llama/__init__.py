"""LLaMA pre-trained with APOLLO, AdamW and others on real text."""
