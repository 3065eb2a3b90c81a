"""Reading what people have: sequences from FASTA and tables, batches by a budget of tokens."""
