"""The commands of `ngpt-deploy`, a module for each kind of work. What they work with is imported when one of them runs."""
