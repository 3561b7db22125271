"""Every property of the contract, over every registered variant: a new variant is tested by being registered."""
