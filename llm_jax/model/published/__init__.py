"""Published models as data: sizes, parts and parameter counts, one row each; `model/presets.py` builds them."""
