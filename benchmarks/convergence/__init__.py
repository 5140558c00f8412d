"""Which optimizer trains a small LLaMA best for the state that it keeps?"""
