"""Raw text to tokenised corpora: readers, tokenizers, the tokenize job."""
