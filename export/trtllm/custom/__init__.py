"""Holds one package and nothing else: `--custom_module_dirs` puts the parent of the folder it is given on sys.path."""
