"""What scripts/faults is made of: the server, its peers, the rows and what runs them."""
