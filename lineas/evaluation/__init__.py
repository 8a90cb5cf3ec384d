"""What maps do to the texts of a model, and at what price: judges, statistics of texts, and intervals."""
