"""What `ngpt-deploy doctor` looks at: the machine, the packages, the card, and what a given build needs of them."""
