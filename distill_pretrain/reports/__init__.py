"""Pages, pictures and tables of runs, scores and comparisons."""
