"""Studies: a question, its variants and seeds, the paper's claims, and what came out."""
