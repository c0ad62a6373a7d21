"""What a recipe will take."""
