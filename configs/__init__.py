"""The shipped configs, installed as a package of data files: `recsys configs` copies them."""
