"""Commands over the packages; `scripts.cli` is the installed command `ngpt-deploy`."""
