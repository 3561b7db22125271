"""What `attnlab new` copies: a working toy and its test for each kind, with `skeleton` in place of the name."""
