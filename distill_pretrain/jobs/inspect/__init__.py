"""What a folder, a recipe's samplers or a model's signal are like."""
