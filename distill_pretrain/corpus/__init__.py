"""Text to tokenised corpora, and the sequences cut from them."""
