"""Applications of apollo_optax that use only its public names."""
