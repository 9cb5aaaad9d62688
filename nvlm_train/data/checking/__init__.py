"""Looking for what is wrong with data: damage, unusable samples, duplicates, evaluation material."""
