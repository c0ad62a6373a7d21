"""What a capture and its students will cost, from recipes and small pilots: figures with their formula and basis."""
