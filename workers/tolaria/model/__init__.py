"""Host models: what is trained and grown."""
